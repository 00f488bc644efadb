"""Scale: rollouts a second by the number of engines, and what each request costs the processes that serve it.

Engines are stubs, so the machine's processors do nothing but the service's work, and one with few of them can hold many
engines. Samples are of 0.5 to 1.5 times the mean length, all lengths alike often, so that answers come at every step
and not in bursts. A run includes its beginning and its end, when not all seats are taken. The ideal is
`engines x seats / (mean tokens x step)`.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass

from engine import SamplingParams
from rollout import RolloutPool
from scripts.bench_pool.processes import Processes, Role, cpu_between
from scripts.bench_pool.stub import VOCAB_SIZE, stub_pool, stub_weights

PROMPT_TOKENS = 64
NUM_WARM_UPS = 2  # syncs


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What every number of engines is given, as long as it is busy for `seconds`."""

    seats: int  # of an engine
    mean_tokens: int  # of a sample
    step_seconds: float
    seconds: float

    def ideal(self, num_engines: int) -> float:
        """Rollouts a second."""
        return num_engines * self.seats / (self.mean_tokens * self.step_seconds)


@dataclass(frozen=True, slots=True, kw_only=True)
class Throughput:
    """One run."""

    num_engines: int
    group_size: int
    num_rollouts: int
    seconds: float
    ideal: float  # rollouts a second
    cpu_seconds: dict[Role, float]

    @property
    def rollouts_per_second(self) -> float:
        return self.num_rollouts / self.seconds

    @property
    def share_of_ideal(self) -> float:
        return self.rollouts_per_second / self.ideal

    def cpu_microseconds(self, role: Role) -> float:
        """Of a request, which is a prompt with all its samples."""
        return 1e6 * self.cpu_seconds[role] * self.group_size / self.num_rollouts


@dataclass(frozen=True, slots=True, kw_only=True)
class Upkeep:
    """What engines cost that are asked for nothing, and what it takes to give them weights of no size."""

    num_engines: int
    start_seconds: float  # until the engines serve that had not been there before
    engine_bytes: int  # of an engine's own memory
    idle_cpu_share: dict[Role, float]  # of one processor
    sync_seconds: list[float]
    sync_cpu_seconds: dict[Role, float]  # of one sync


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """All runs, by turns, and the upkeep of each number of engines."""

    runs: list[Throughput]
    upkeep: list[Upkeep]


def measure(
    load: Load,
    engines: Sequence[int],
    group_sizes: Sequence[int],
    repetitions: int,
    idle_seconds: float,
    num_syncs: int,
) -> Scale:
    """One pool, which grows."""
    runs, upkeep = [], []
    with stub_pool(1, load.seats, load.step_seconds) as pool:
        for num_engines in sorted(engines):
            start = time.perf_counter()
            pool.scale(num_engines)
            upkeep.append(look_after(pool, num_engines, time.perf_counter() - start, idle_seconds, num_syncs))
            for group_size in group_sizes:
                serve(pool, load, num_engines, group_size, 0.5, seed=1000)
                runs += [serve(pool, load, num_engines, group_size, load.seconds, turn) for turn in range(repetitions)]
        pool.check_integrity()
    return Scale(runs=runs, upkeep=upkeep)


def serve(pool: RolloutPool, load: Load, num_engines: int, group_size: int, seconds: float, seed: int) -> Throughput:
    """As many rollouts as ideal engines would draw in so many seconds."""
    ideal = load.ideal(num_engines)
    num_groups = max(1, round(seconds * ideal / group_size))
    prompts, params = requests(load.mean_tokens, num_groups, group_size, seed)
    processes = Processes(pool)
    before, start, num_rollouts = processes.cpu_seconds(), time.perf_counter(), 0
    for group in pool.stream(prompts, params):
        num_rollouts += len(group)
    elapsed = time.perf_counter() - start
    assert num_rollouts == num_groups * group_size, "rollouts are lost"
    return Throughput(
        num_engines=num_engines,
        group_size=group_size,
        num_rollouts=num_rollouts,
        seconds=elapsed,
        ideal=ideal,
        cpu_seconds=cpu_between(before, processes.cpu_seconds()),
    )


def requests(
    mean_tokens: int, num_groups: int, group_size: int, seed: int
) -> tuple[list[list[int]], list[SamplingParams]]:
    """Distinct prompts and their parameters."""
    draw = random.Random(seed)
    shortest = max(1, mean_tokens // 2)
    all_params = [
        SamplingParams(n=group_size, max_tokens=length) for length in range(shortest, 2 * mean_tokens - shortest + 1)
    ]
    prompts = [[draw.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(num_groups)]
    return prompts, [draw.choice(all_params) for _ in range(num_groups)]


def look_after(
    pool: RolloutPool, num_engines: int, start_seconds: float, idle_seconds: float, num_syncs: int
) -> Upkeep:
    processes = Processes(pool)
    before = processes.cpu_seconds()
    time.sleep(idle_seconds)
    idle = cpu_between(before, processes.cpu_seconds())
    for _ in range(NUM_WARM_UPS):
        sync(pool)
    before = processes.cpu_seconds()
    seconds = [sync(pool) for _ in range(num_syncs)]
    cpu = cpu_between(before, processes.cpu_seconds())
    return Upkeep(
        num_engines=num_engines,
        start_seconds=start_seconds,
        engine_bytes=processes.own_bytes("engines"),
        idle_cpu_share={role: value / idle_seconds for role, value in idle.items()},
        sync_seconds=seconds,
        sync_cpu_seconds={role: value / num_syncs for role, value in cpu.items()},
    )


def sync(pool: RolloutPool) -> float:
    version = pool.policy_version + 1
    report = pool.sync_weights(stub_weights(version), version)
    assert report.is_lockstep, "an engine has other weights"
    return report.seconds
