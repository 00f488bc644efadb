"""Overhead: what the host does in a decode step, part by part, how it grows, and how much of it the device hides."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from engine import EngineConfig, SamplingParams
from engine.block_pool import BlockPool
from engine.outputs import StepOutput
from engine.request import Request
from engine.scheduler import Scheduler
from engine.step_plan import ModelRunnerOutput, SchedulerOutput
from scripts.bench_scheduling.replay import frozen_heap
from scripts.bench_scheduling.stand_in import StandIn
from scripts.bench_scheduling.v0_loop import V0Scheduler
from scripts.bench_scheduling.variants import TINY
from scripts.gpu_check.random_models import random_engine

PARTS = ("schedule", "prepare", "execute", "update")
PROMPT_TOKENS = 32
WARM_STEPS, TIMED_STEPS = 16, 64  # in the time taken everybody fills four blocks of 16


class AnyScheduler(Protocol):
    """The engine's, or that of the V0-style loop."""

    def add(self, leader: Request) -> None: ...

    def schedule(self) -> SchedulerOutput: ...

    def update_from_output(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> StepOutput: ...


@frozen_heap()
def scheduler_milliseconds(num_running: int) -> float:
    """Of `schedule` and `update_from_output` in a decode step of so many requests; the mean, new blocks included."""
    scheduler = Scheduler(*_config_and_pool(num_running))
    _add_requests(scheduler, num_running)
    seconds = []
    for number in range(WARM_STEPS + TIMED_STEPS):
        start = time.perf_counter()
        plan = scheduler.schedule()
        planned = time.perf_counter()
        output = ModelRunnerOutput(token_ids=[7] * num_running, logprobs=[0.0] * num_running, policy_version=0)
        drawn = time.perf_counter()
        scheduler.update_from_output(plan, output)
        if number >= WARM_STEPS:
            seconds.append(time.perf_counter() - drawn + planned - start)
    return 1e3 * statistics.mean(seconds)


def growth_exponent(sizes: Sequence[int], milliseconds: Sequence[float]) -> float:
    """Slope of log(time) over log(size), as a straight line fits it best: 1 is linear growth."""
    return float(np.polyfit(np.log(sizes), np.log(milliseconds), 1)[0])


@frozen_heap()
def host_parts(num_running: int, is_v0: bool) -> dict[str, float]:
    """Milliseconds of each part of a decode step, one after the other on one thread; the device's time left out."""
    config, block_pool = _config_and_pool(num_running)
    scheduler: AnyScheduler = (V0Scheduler if is_v0 else Scheduler)(config, block_pool)
    runner = StandIn(0.0, config)
    _add_requests(scheduler, num_running)
    times = [_timed_step(scheduler, runner) for _ in range(WARM_STEPS + TIMED_STEPS)][WARM_STEPS:]
    return {part: 1e3 * statistics.mean(column) for part, column in zip(PARTS, zip(*times))}


def hidden_share(num_running: int, step_seconds: float) -> dict[str, float]:
    """Milliseconds of the device's and of whole decode steps, and the share of the host's work that async hides."""
    sync, device = _decode_step(num_running, step_seconds, is_async=False)
    overlapped, _ = _decode_step(num_running, step_seconds, is_async=True)
    share = 1 - (overlapped - device) / (sync - device)
    return {"device": 1e3 * device, "sync": 1e3 * sync, "async": 1e3 * overlapped, "hidden": share}


@frozen_heap()
def _decode_step(num_running: int, step_seconds: float, is_async: bool) -> tuple[float, float]:
    """Mean seconds of a decode step, and of the device in it."""
    config, block_pool = _config_and_pool(num_running)
    runner = StandIn(step_seconds, config)
    options: dict[str, Any] = {
        name: getattr(config, name) for name in ("max_model_len", "max_num_seqs", "max_num_batched_tokens")
    }
    engine = random_engine(TINY, runner=runner, num_blocks=block_pool.num_blocks, async_scheduling=is_async, **options)
    _add_requests(engine.scheduler, num_running)
    for _ in range(WARM_STEPS):
        engine.step()
    runner.slept_seconds, times = 0.0, []
    for _ in range(TIMED_STEPS):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return statistics.mean(times), runner.slept_seconds / TIMED_STEPS


def _timed_step(scheduler: AnyScheduler, runner: StandIn) -> list[float]:
    """Seconds of each of PARTS."""
    slept = runner.slept_seconds
    marks = [time.perf_counter()]
    plan = scheduler.schedule()
    marks.append(time.perf_counter())
    prepared = runner.prepare(plan)
    marks.append(time.perf_counter())
    output = runner.execute(prepared)
    slept = runner.slept_seconds - slept
    marks.append(time.perf_counter() - slept)
    scheduler.update_from_output(plan, output)
    marks.append(time.perf_counter() - slept)
    return [end - begin for begin, end in pairwise(marks)]


def _config_and_pool(num_running: int) -> tuple[EngineConfig, BlockPool]:
    max_model_len = PROMPT_TOKENS + WARM_STEPS + TIMED_STEPS + 4
    config = EngineConfig(
        "stand-in", max_model_len=max_model_len, max_num_seqs=num_running,
        max_num_batched_tokens=max(max_model_len, num_running * PROMPT_TOKENS),
    )  # fmt: skip
    blocks_each = -(-max_model_len // config.block_size)
    return config, BlockPool(num_running * (blocks_each + 1) + 1, config.block_size)


def _add_requests(scheduler: AnyScheduler, num_running: int) -> None:
    """Distinct prompts, whose requests will not end."""
    params = SamplingParams(max_tokens=WARM_STEPS + TIMED_STEPS + 3, ignore_eos=True)
    for number in range(num_running):
        prompt = [number + 1] * PROMPT_TOKENS
        scheduler.add(Request.create_group(request_id=str(number), prompt_token_ids=prompt, params=params, seed=number))
