"""Long runs: what their processes hold does not grow."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from recipe_runs import Run, start_run

FIRST, LAST = 100, 500  # steps between which nothing may grow
MAX_GROWTH = 0.02
ROLES = ("recipes.grpo_math", "ray::EngineActor", "ray::RemoteGRPOActor", "ray::PoolCoordinator", "ray::WeightStore")


def resident_bytes(run: Run) -> dict[str, int]:
    """Of the run's own processes, by role."""
    found: dict[str, int] = {}
    for pid, command_line in run.processes_by_id().items():
        for role in ROLES:
            if role in command_line:
                found[role] = found.get(role, 0) + psutil.Process(pid).memory_info().rss
    assert found.keys() == set(ROLES)
    return found


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("mode", ["sync", "async"])
def test_five_hundred_steps_take_no_more_memory_than_one_hundred(
    mode: str, tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str
):
    settings = ["--mode", mode, "--num-steps", str(LAST + 1), "--eval-every", "0", "--checkpoint-every", "50"]
    run = start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "run", *settings, "--journal")
    run.wait_for(f"step {FIRST}/")
    before = resident_bytes(run)
    run.wait_for(f"step {LAST}/")
    after = resident_bytes(run)
    run.wait()
    growth = {role: after[role] / before[role] - 1 for role in ROLES}
    print({role: f"{before[role] / 2**20:.0f} MiB {growth[role]:+.2%}" for role in ROLES})
    assert sum(after.values()) < (1 + MAX_GROWTH) * sum(before.values()), growth
    assert all(share < MAX_GROWTH for share in growth.values()), growth
