"""EngineActor: the Ray actor around one engine loop."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch

import kernels
from engine import EngineConfig
from engine.outputs import EngineStats
from rollout.engine_loop import EngineLoop
from rollout.requests import GroupRequest, GroupResult
from rollout.sync_report import CommitReport, SyncMode
from rollout.weight_sync import StagedWeights, WeightBucket, WeightStaging

# Waiting collects, one for each caller, have threads of their own, so that they never hold up a command.
MAX_WAITING_CALLERS = 64
MAX_COMMANDS = 8

EngineFactory = Callable[[EngineConfig], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself when it is ready."""

    pid: int
    node_id: str
    num_threads: int  # of the kernels, as they report it
    max_model_len: int
    kernel_fingerprint: str
    weight_shapes: dict[str, tuple[int, ...]]  # by Hugging Face name, all that a sync must bring


@ray.remote(num_cpus=0, max_concurrency=MAX_COMMANDS, concurrency_groups={"collect": MAX_WAITING_CALLERS})
class EngineActor:
    """Every method may be called while the engine steps; errors reach the caller with their cause."""

    def __init__(self) -> None:
        self._loop: EngineLoop | None = None
        self._staging = WeightStaging()
        # weights arrive as read-only shared memory and are only ever read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def start(self, config: EngineConfig, build_engine: EngineFactory) -> EngineInfo:
        """Builds the engine and begins to step it."""
        self._loop = EngineLoop(lambda: _build_on_this_thread(config, build_engine))
        self._loop.start()
        gc.collect()
        gc.freeze()  # the model and its libraries live as long as the process: no collection need look at them again
        return self._loop.run(_describe)

    def submit(self, call_id: str, requests: Sequence[GroupRequest]) -> None:
        self._loop.submit(call_id, requests)

    @ray.method(concurrency_group="collect")
    def collect(self, call_id: str, timeout: float) -> list[GroupResult]:
        return self._loop.collect(call_id, timeout)

    def abort(self, group_ids: Sequence[str]) -> list[str]:
        return self._loop.abort(group_ids)

    def forget(self, call_id: str) -> None:
        self._loop.forget(call_id)

    def stage_weights(self, sync_id: str, bucket: WeightBucket) -> None:
        """First phase, beside the running engine: verifies the bucket and holds it."""
        self._staging.add(sync_id, bucket)

    def discard_weights(self, sync_id: str) -> None:
        self._staging.discard(sync_id)

    def commit_weights(self, sync_id: str, policy_version: int, mode: SyncMode) -> CommitReport:
        """Second phase, between two steps: copies what was staged into the engine's storage."""
        staged = self._staging.take(sync_id)
        if mode == "wait":
            return self._commit_when_finished(staged, policy_version)
        return self._loop.run(lambda engine: _update_weights(engine, staged, policy_version, mode))

    def _commit_when_finished(self, staged: StagedWeights, policy_version: int) -> CommitReport:
        """Requests that have begun end first, while the loop goes on serving other commands."""
        self._loop.run(lambda engine: engine.pause("wait"))
        try:
            while self._loop.run(lambda engine: engine.can_step()):
                pass  # answered after every step
            return self._loop.run(lambda engine: _update_weights(engine, staged, policy_version, "recompute"))
        finally:
            self._loop.run(lambda engine: engine.resume())

    def stats(self) -> EngineStats:
        return self._loop.run(lambda engine: engine.stats())

    def write_trace(self) -> Path:
        return self._loop.run(lambda engine: engine.write_trace())

    def check_integrity(self) -> None:
        self._loop.run(lambda engine: engine.check_integrity())


def _build_on_this_thread(config: EngineConfig, build_engine: EngineFactory) -> Any:
    # torch keeps its thread count by thread, so it is set on the one that steps the engine, which sets the kernels'
    torch.set_num_threads(config.num_threads)
    return build_engine(config)


def _describe(engine: Any) -> EngineInfo:
    return EngineInfo(
        pid=os.getpid(),
        node_id=ray.get_runtime_context().get_node_id(),
        num_threads=kernels.get_num_threads(),
        max_model_len=engine.max_model_len,
        kernel_fingerprint=engine.kernel_fingerprint,
        weight_shapes=engine.weight_shapes(),
    )


def _update_weights(engine: Any, staged: StagedWeights, policy_version: int, mode: SyncMode) -> CommitReport:
    start = time.perf_counter()
    update = engine.update_weights(staged.tensors, policy_version, mode, staged.digests)
    return CommitReport(
        policy_version=engine.policy_version,
        checksum=update.checksum,
        pause_seconds=time.perf_counter() - start,
        num_recomputed_tokens=update.num_recomputed_tokens,
    )
