"""EngineActor: the Ray actor around one engine loop."""

from __future__ import annotations

import gc
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ray

import kernels
from engine import EngineConfig
from engine.outputs import EngineStats, UpdateMode
from rollout import logs
from rollout.engine_loop import EngineLoop, Progress
from rollout.metrics import LatencyMetrics
from rollout.requests import GroupRequest, GroupResult, Partials
from rollout.sync_report import CommitReport
from rollout.weight_parcel import WeightParcel

if TYPE_CHECKING:  # the coordinator and its handles import this module, and start sooner without torch
    from rollout.weight_sync import StagedWeights, WeightStaging

# Waiting collects, one for each caller, have threads of their own, so that they never hold up a command; and the
# supervisor has its own, so that it hears of an engine that keeps everybody else waiting.
MAX_WAITING_CALLERS = 64
MAX_COMMANDS = 8
CONCURRENCY = {"collect": MAX_WAITING_CALLERS, "supervise": 2}

EngineFactory = Callable[[EngineConfig], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineName:
    """Which engine of which pool an actor is, and which of its lives."""

    pool: str
    engine_id: int
    incarnation: int

    def __str__(self) -> str:
        return f"{self.pool}/engine-{self.engine_id}.{self.incarnation}"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineInfo:
    """What an engine says of itself when it is ready."""

    pid: int
    node_id: str
    num_threads: int  # of the kernels, as they report it
    max_model_len: int
    kernel_fingerprint: str
    weights_checksum: bytes  # of the weights that it started with
    weight_shapes: dict[str, tuple[int, ...]]  # by Hugging Face name, all that a sync must bring


@ray.remote(num_cpus=0, max_concurrency=MAX_COMMANDS, concurrency_groups=CONCURRENCY)
class EngineActor:
    """Every method may be called while the engine steps; errors reach the caller with their cause."""

    def __init__(self, name: EngineName) -> None:
        from rollout.weight_sync import WeightStaging

        logs.configure(pool=name.pool, actor="engine", engine_id=name.engine_id, incarnation=name.incarnation)
        self._latency = LatencyMetrics(name.pool, name.engine_id)
        self._loop: EngineLoop | None = None
        self._staging: WeightStaging = WeightStaging()
        # weights arrive as read-only shared memory and are only ever read
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")

    def start(self, config: EngineConfig, build_engine: EngineFactory | None) -> EngineInfo:
        """Builds the engine, an `LLMEngine` by default, and begins to step it."""
        self._loop = EngineLoop(lambda: _build_on_this_thread(config, build_engine), self._latency.show)
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

    def stage_weights(self, sync_id: str, parcel: WeightParcel) -> None:
        """First phase, beside the running engine: verifies the bucket and holds it."""
        self._staging.add(sync_id, parcel.open())

    def discard_weights(self, sync_id: str) -> None:
        self._staging.discard(sync_id)

    def finish_started(self) -> None:
        """Lets the requests that have begun run to their end and begins no other, until weights are committed or
        `resume` is called. The loop goes on serving other commands."""
        self._loop.run(lambda engine: engine.pause("wait"), "pause")
        while self._loop.run(lambda engine: engine.can_step(), "finish_started"):
            pass  # answered after every step

    def resume(self) -> None:
        self._loop.run(_resume, "resume")

    def commit_weights(self, sync_id: str, policy_version: int, mode: UpdateMode) -> CommitReport:
        """Second phase, between two steps: copies what was staged into the engine's storage.

        What was drawn until then goes into the report, so that nothing is lost if the engine dies later.
        """
        staged = self._staging.take(sync_id)
        return self._loop.run(
            lambda engine: _update_weights(engine, self._loop, staged, policy_version, mode), "commit_weights"
        )

    @ray.method(concurrency_group="supervise")
    def wait_until_stopped(self) -> None:
        """Raises, with the cause, once the engine is no longer stepped."""
        self._loop.wait_until_stopped()

    @ray.method(concurrency_group="supervise")
    def progress(self) -> Progress:
        return self._loop.progress()

    def retire(self) -> Partials:
        """Stops the engine for good; what was drawn for groups that nobody has collected."""
        return self._loop.retire()

    def stats(self) -> EngineStats:
        return self._loop.run(lambda engine: engine.stats(), "stats")

    def write_trace(self) -> Path:
        return self._loop.run(lambda engine: engine.write_trace(), "write_trace")

    def check_integrity(self) -> None:
        self._loop.run(lambda engine: engine.check_integrity(), "check_integrity")


def _build_on_this_thread(config: EngineConfig, build_engine: EngineFactory | None) -> Any:
    import torch

    from engine import LLMEngine

    # torch keeps its thread count by thread, so it is set on the one that steps the engine, which sets the kernels'
    torch.set_num_threads(config.num_threads)
    return (build_engine or LLMEngine)(config)


def _describe(engine: Any) -> EngineInfo:
    return EngineInfo(
        pid=os.getpid(),
        node_id=ray.get_runtime_context().get_node_id(),
        num_threads=kernels.get_num_threads(),
        max_model_len=engine.max_model_len,
        kernel_fingerprint=engine.kernel_fingerprint,
        weights_checksum=engine.weights_checksum,
        weight_shapes=engine.weight_shapes(),
    )


def _resume(engine: Any) -> None:
    if engine.is_paused:
        engine.resume()


def _update_weights(
    engine: Any, loop: EngineLoop, staged: StagedWeights, policy_version: int, mode: UpdateMode
) -> CommitReport:
    start = time.perf_counter()
    update = engine.update_weights(staged.tensors, policy_version, mode, staged.digests)
    pause_seconds = time.perf_counter() - start
    _resume(engine)
    return CommitReport(
        policy_version=engine.policy_version,
        checksum=update.checksum,
        pause_seconds=pause_seconds,
        num_recomputed_tokens=update.num_recomputed_tokens,
        partials=loop.partials(engine),
    )
