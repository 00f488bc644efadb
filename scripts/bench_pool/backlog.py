"""Backlog: the driver's memory while a long queue of prompts goes through a few engines and the consumer keeps nothing.

The prompts come as a list, which the caller holds, and as an iterator, which is read as engines have room. Growth is
over what was resident just before the call, the caller's list included.
"""

from __future__ import annotations

import gc
import random
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Literal

from engine import SamplingParams
from rollout import RolloutPool
from scripts.bench_pool.processes import Processes
from scripts.bench_pool.stub import VOCAB_SIZE, stub_pool

Kind = Literal["iterator", "list"]
KINDS: tuple[Kind, ...] = ("iterator", "list")  # the list last: memory that it leaves behind would hide a growth
PROMPT_TOKENS, NEW_TOKENS = 64, 8
NUM_WARM_UPS = 2000  # prompts
SAMPLE_SECONDS = 0.05
PLACES = 10  # at which memory is noted, besides its peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """One run."""

    kind: Kind
    num_prompts: int
    seconds: float
    driver_baseline: int  # resident bytes
    driver_peak: int
    driver_growth: list[int]  # after each tenth of the prompts
    coordinator_baseline: int
    coordinator_peak: int

    @property
    def bytes_per_prompt(self) -> float:
        return (self.driver_peak - self.driver_baseline) / self.num_prompts


class PeakMemory:
    """The most that driver and coordinator had resident while this context was open; looked at 20 times a second."""

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        self._has_ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.driver = self.coordinator = 0

    def __enter__(self) -> PeakMemory:
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._has_ended.set()
        self._thread.join()
        self._look()

    def _watch(self) -> None:
        while not self._has_ended.wait(SAMPLE_SECONDS):
            self._look()

    def _look(self) -> None:
        self.driver = max(self.driver, self._processes.resident_bytes("driver"))
        self.coordinator = max(self.coordinator, self._processes.resident_bytes("coordinator"))


def measure(num_prompts: int, num_engines: int, seats: int, step_seconds: float) -> list[Backlog]:
    with stub_pool(num_engines, seats, step_seconds) as pool:
        for kind in KINDS:
            drain(pool, kind, min(NUM_WARM_UPS, num_prompts))
        return [drain(pool, kind, num_prompts) for kind in KINDS]


def drain(pool: RolloutPool, kind: Kind, num_prompts: int) -> Backlog:
    """Streams all prompts and drops every rollout at once."""
    prompts = all_prompts(num_prompts) if kind == "iterator" else list(all_prompts(num_prompts))
    gc.collect()
    processes = Processes(pool)
    driver, coordinator = processes.resident_bytes("driver"), processes.resident_bytes("coordinator")
    growth, start = [], time.perf_counter()
    with PeakMemory(processes) as peak:
        stream = pool.stream(prompts, SamplingParams(max_tokens=NEW_TOKENS))
        for num_arrived, _ in enumerate(stream, start=1):
            if num_arrived * PLACES // num_prompts > len(growth):
                growth.append(processes.resident_bytes("driver") - driver)
    assert num_arrived == num_prompts, "prompts are lost"
    return Backlog(
        kind=kind,
        num_prompts=num_prompts,
        seconds=time.perf_counter() - start,
        driver_baseline=driver,
        driver_peak=peak.driver,
        driver_growth=growth,
        coordinator_baseline=coordinator,
        coordinator_peak=peak.coordinator,
    )


def all_prompts(num_prompts: int) -> Iterator[list[int]]:
    draw = random.Random(0)
    for _ in range(num_prompts):
        yield [draw.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
