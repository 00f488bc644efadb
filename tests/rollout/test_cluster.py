from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from rollout.cluster import GIB, MIB, plan_object_store, weights_num_bytes

SOURCE_ROOT = Path(__file__).resolve().parents[2]

OWN_RAY = """
import json, sys, time
import psutil, ray
from rollout import EngineConfig, RolloutPool, SamplingParams

with RolloutPool(EngineConfig(sys.argv[1], num_threads=1), num_engines=1, seed=5) as pool:
    assert ray.is_initialized()
    num_threads = [info.num_threads for info in pool.engine_infos]
    groups = pool.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=4))
    processes = psutil.Process().children(recursive=True)
pool.shutdown()
assert not ray.is_initialized()
gone, alive = psutil.wait_procs(processes, timeout=5)
print(json.dumps({
    "num_processes": len(processes), "alive": [p.cmdline() for p in alive], "num_threads": num_threads,
    "token_ids": [r.token_ids for r in groups[0]],
}))
"""

JOINED_RAY = """
import json, sys
import ray
from rollout import EngineConfig, RolloutPool, SamplingParams

with RolloutPool(EngineConfig(sys.argv[1], num_threads=1), num_engines=1, seed=5) as pool:
    node_id = pool.engine_infos[0].node_id
    groups = pool.generate([[5, 6, 7]], SamplingParams(n=2, max_tokens=4))
print(json.dumps({
    "node_id": node_id, "is_connected": ray.is_initialized(), "token_ids": [r.token_ids for r in groups[0]]
}))
"""


def start_elsewhere(script: str, model_dir: Path, directory: Path, **environment: str) -> subprocess.Popen:
    """Starts a script whose working directory is not that of the source."""
    inherited = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    return subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(SOURCE_ROOT)!r})\n{script}", str(model_dir)],
        cwd=directory,
        env=inherited | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def result_of(process: subprocess.Popen) -> dict:
    """What the script printed last, as JSON."""
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    return json.loads(output.splitlines()[-1])


def test_a_ray_of_ones_own_is_gone_after_shutdown_and_a_joined_one_is_not(local_ray, model_dir, tmp_path):
    address = ray.get_runtime_context().gcs_address
    own_process = start_elsewhere(OWN_RAY, model_dir, tmp_path)
    joined_process = start_elsewhere(JOINED_RAY, model_dir, tmp_path, RAY_ADDRESS=address)
    own, joined = result_of(own_process), result_of(joined_process)
    assert own["num_processes"] > 3
    assert own["alive"] == []
    assert own["num_threads"] == [1]
    assert joined["node_id"] == ray.get_runtime_context().get_node_id()
    assert joined["is_connected"]
    assert joined["token_ids"] == own["token_ids"]
    assert ray.get(ray.put("still here")) == "still here"


def test_the_object_store_holds_the_weights_twice_where_shared_memory_allows():
    plan = plan_object_store(weights_bytes=GIB, shared_memory_bytes=16 * GIB, disk_bytes=0)
    assert 2 * GIB < plan.num_bytes < 3 * GIB
    assert plan.warning is None
    tight = plan_object_store(weights_bytes=GIB, shared_memory_bytes=int(1.6 * GIB), disk_bytes=0)
    assert GIB < tight.num_bytes < 1.6 * GIB
    assert tight.warning is None


def test_small_shared_memory_goes_to_disk_and_says_the_way_out():
    plan = plan_object_store(weights_bytes=GIB, shared_memory_bytes=64 * MIB, disk_bytes=100 * GIB)
    assert plan.num_bytes > GIB
    assert "64 MiB" in plan.warning
    assert "--shm-size=2g" in plan.warning


@pytest.mark.parametrize(("weights_bytes", "disk_bytes"), [(GIB, GIB), (20 * GIB, 100 * GIB)])
def test_no_room_at_all_is_an_error_with_the_way_out(monkeypatch, weights_bytes, disk_bytes):
    monkeypatch.delenv("RAY_OBJECT_STORE_ALLOW_SLOW_STORAGE", raising=False)
    with pytest.raises(RuntimeError, match="--shm-size"):
        plan_object_store(weights_bytes, shared_memory_bytes=64 * MIB, disk_bytes=disk_bytes)


def test_weights_are_counted_as_float32(model_dir):
    from engine.checkpoint import iter_weights

    assert weights_num_bytes(model_dir) == sum(4 * tensor.numel() for _, tensor in iter_weights(model_dir))


def test_the_coordinator_of_a_pool_starts_without_torch():
    """Every pool's start waits for it."""
    code = "import sys, rollout.coordinator; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
