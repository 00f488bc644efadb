"""What befalls a pool on a Ray cluster of several node processes: `python -m tests.rollout.nodes SCENARIO DIRECTORY`.

A scenario is a process of its own, since a test's process has its Ray already. It takes the model and weights of the
directory and leaves there what it saw, for the test to judge.
"""

from __future__ import annotations

import os
import pickle
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import ray
import torch
from ray.cluster_utils import Cluster
from safetensors.torch import load_file

from engine import EngineConfig, SamplingParams
from rollout import EngineError, RolloutPool
from tests.rollout.waiting import IDS, LONG, PROMPTS, in_order, wait_for, wait_for_tokens

SMALL = {"object_store_memory": 100 * 2**20}
QUICK_TO_NOTICE = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 1000}  # Ray's own period is 3 s
PARAMS = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
SEED = 5


@dataclass
class Nodes:
    """The node on which the scenario runs, and others of one CPU for engines."""

    cluster: Cluster
    directory: Path

    def add(self) -> None:
        self.cluster.add_node(num_cpus=1, **SMALL)

    def kill(self, node_id: str) -> None:
        """As if its machine lost power: the node's process and all that it started, at once."""
        [node] = [node for node in self.cluster.worker_nodes if node.node_id == node_id]
        [raylet] = [psutil.Process(info.process.pid) for info in node.all_processes["raylet"]]
        doomed = [raylet, *raylet.children(recursive=True)]
        for process in doomed:
            os.kill(process.pid, signal.SIGSTOP)  # so that none sees another one's end
        for process in doomed:
            os.kill(process.pid, signal.SIGKILL)

    def pool(self, **options: Any) -> RolloutPool:
        config = EngineConfig(str(self.directory / "model"), num_threads=1, num_blocks=512)
        spread = {"num_engines": 2, "engine_cpus": 1, "placement": "STRICT_SPREAD"}
        return RolloutPool(config, seed=SEED, **(spread | options))

    def weights(self, version: int) -> dict[str, torch.Tensor]:
        return load_file(self.directory / f"{version}.safetensors")


@contextmanager
def started(directory: Path, num_nodes: int, head_cpus: int = 0) -> Iterator[Nodes]:
    """num_nodes: besides the scenario's own, which has head_cpus for engines."""
    head = {"num_cpus": head_cpus, "include_dashboard": False, "_system_config": QUICK_TO_NOTICE, **SMALL}
    nodes = Nodes(Cluster(initialize_head=True, head_node_args=head), directory)
    try:
        for _ in range(num_nodes):
            nodes.add()
        os.environ["RAY_ADDRESS"] = nodes.cluster.address
        yield nodes
    finally:
        ray.shutdown()
        nodes.cluster.shutdown()


def wait_for_engines(pool: RolloutPool, num_engines: int) -> None:
    wait_for(lambda: len(pool.engine_infos) == num_engines)


def a_node_dies(directory: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with started(directory, num_nodes=1, head_cpus=1) as nodes, nodes.pool() as pool:
        here = ray.get_runtime_context().get_node_id()
        [there] = {info.node_id for info in pool.engine_infos} - {here}
        seen["first sync"] = pool.sync_weights(nodes.weights(1), 1)
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for_tokens(pool)
        nodes.kill(there)
        seen["disturbed"] = in_order(stream)
        seen["after death"] = pool.stats()
        seen["second sync"] = pool.sync_weights(nodes.weights(2), 2)
        seen["by one"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        pool.check_integrity()
    return seen


def a_node_dies_and_another_comes(directory: Path) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with started(directory, num_nodes=2) as nodes, nodes.pool() as pool:
        seen["nodes"] = [info.node_id for info in pool.engine_infos]
        seen["spread"] = pool.generate(PROMPTS, LONG, group_ids=IDS)
        seen["first sync"] = pool.sync_weights(nodes.weights(1), 1)
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for_tokens(pool)
        nodes.kill(pool.engine_infos[1].node_id)
        seen["disturbed"] = in_order(stream)
        seen["after death"] = pool.stats()
        seen["second sync"] = pool.sync_weights(nodes.weights(2), 2)
        seen["by one"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        nodes.add()
        wait_for_engines(pool, 2)
        seen["after return"] = pool.stats()
        seen["by both"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        seen["nodes at the end"] = [info.node_id for info in pool.engine_infos]
        seen["third sync"] = pool.sync_weights(nodes.weights(3), 3)
        pool.check_integrity()
    return seen


def a_node_dies_in_a_sync(directory: Path, mode: str) -> dict[str, Any]:
    seen: dict[str, Any] = {}
    with started(directory, num_nodes=2) as nodes, nodes.pool() as pool:
        pool.sync_weights(nodes.weights(1), 1)
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for_tokens(pool)
        killer = threading.Timer(0.05, nodes.kill, [pool.engine_infos[1].node_id])
        killer.start()
        seen["sync"] = pool.sync_weights(nodes.weights(2), 2, mode=mode)
        seen["groups"] = in_order(stream)
        killer.join()
        seen["after death"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        nodes.add()
        wait_for_engines(pool, 2)
        seen["versions"] = [stats.policy_version for stats in pool.stats().engines]
        seen["after return"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        pool.check_integrity()
    return seen


def a_node_dies_in_a_recompute_sync(directory: Path) -> dict[str, Any]:
    return a_node_dies_in_a_sync(directory, "recompute")


def a_node_dies_in_a_wait_sync(directory: Path) -> dict[str, Any]:
    return a_node_dies_in_a_sync(directory, "wait")


def all_nodes_die_and_others_come(directory: Path) -> dict[str, Any]:
    """Weights included: only the sender's node, which has no engine, is left."""
    seen: dict[str, Any] = {}
    with started(directory, num_nodes=2) as nodes, nodes.pool() as pool:
        pool.sync_weights(nodes.weights(1), 1)
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for_tokens(pool)
        for info in pool.engine_infos:
            nodes.kill(info.node_id)
        nodes.add()
        nodes.add()
        seen["groups"] = in_order(stream)
        wait_for_engines(pool, 2)
        seen["versions"] = [stats.policy_version for stats in pool.stats().engines]
        seen["sync"] = pool.sync_weights(nodes.weights(2), 2)
        seen["after sync"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        pool.check_integrity()
    return seen


def no_place_for_a_replacement(directory: Path) -> dict[str, Any]:
    """It is looked for again and again; when nobody is left to draw, callers hear of it; and scaling does not hang."""
    seen: dict[str, Any] = {}
    with started(directory, num_nodes=2) as nodes, nodes.pool(start_seconds=20.0) as pool:
        first, second = pool.engine_infos
        nodes.kill(second.node_id)
        # The first replacement may still be given the place on the dead node, which Ray takes a while to notice.
        wait_for(lambda: sum("no place" in fault.cause for fault in pool.stats().faults) >= 2)
        seen["while others serve"] = pool.stats()
        seen["by one"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        seen["scaled down"] = len(pool.scale(1))
        try:
            pool.scale(2)
        except ValueError as error:
            seen["scaled up without a node"] = str(error)
        nodes.kill(first.node_id)
        try:
            pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        except EngineError as error:
            seen["nobody serves"] = str(error)
        nodes.add()
        nodes.add()  # Ray places the lost bundles of a group together or not at all
        wait_for_engines(pool, 1)
        seen["by the first to return"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        seen["scaled up"] = len(pool.scale(2))
        seen["by both"] = pool.generate(PROMPTS, PARAMS, group_ids=IDS)
        pool.check_integrity()
    return seen


SCENARIOS: dict[str, Callable[[Path], dict[str, Any]]] = {
    scenario.__name__: scenario
    for scenario in (
        a_node_dies,
        a_node_dies_and_another_comes,
        a_node_dies_in_a_recompute_sync,
        a_node_dies_in_a_wait_sync,
        all_nodes_die_and_others_come,
        no_place_for_a_replacement,
    )
}

if __name__ == "__main__":
    name, directory = sys.argv[1], Path(sys.argv[2])
    (directory / f"{name}.pickle").write_bytes(pickle.dumps(SCENARIOS[name](directory)))
