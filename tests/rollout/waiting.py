"""Groups that are long on their way, and waiting for what befalls a pool that draws them."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

import psutil

from engine import SamplingParams
from rollout import Rollout, RolloutPool

PROMPTS = [[7 + i, 11, 13 + i, 17] for i in range(16)]
IDS = [f"p{i}" for i in range(len(PROMPTS))]
LONG = SamplingParams(n=2, max_tokens=200, ignore_eos=True)


def in_order(groups: Iterable[list[Rollout]]) -> list[list[Rollout]]:
    return sorted(groups, key=lambda group: IDS.index(group[0].group_id))


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def wait_for_tokens(pool: RolloutPool) -> None:
    """Until every engine has drawn some more."""
    before = [stats.num_generated_tokens for stats in pool.stats().engines]

    def have_drawn() -> bool:
        now = [stats.num_generated_tokens for stats in pool.stats().engines]
        return all(after > start + 50 for start, after in zip(before, now, strict=True))

    wait_for(have_drawn)


def has_ended(pid: int) -> bool:
    """Also when nobody has asked for its exit code yet, as an orphan's new parent may not have for a while."""
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True
