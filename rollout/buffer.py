"""RolloutBuffer: submit and collect for asynchronous trainers, with a bound on how old a collected sample may be."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn

from rollout import logs
from rollout.errors import PoolDrainingError
from rollout.rollout import Rollout
from rollout.submission import PendingGroup, Submission

logger = logging.getLogger(__name__)

OnStale = Literal["drop", "redraw"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StalenessLimit:
    """How many policy versions a collected token may lie behind, and how a group that is older is treated.

    A trainer that takes `groups_per_version` groups for each version it makes can be promised the bound if no more than
    (max_staleness + 1) x groups_per_version groups are on their way: that is what `has_capacity` admits (the rule of
    AReaL, section 5.1). A group that is slower than those after it may still be too old: it is dropped, or its prompt
    is drawn again.
    """

    max_staleness: int
    groups_per_version: int
    on_stale: OnStale = "drop"

    def __post_init__(self) -> None:
        if self.max_staleness < 0:
            raise ValueError(f"max_staleness={self.max_staleness} must be at least 0 (0: on policy)")
        if self.groups_per_version < 1:
            raise ValueError(f"groups_per_version={self.groups_per_version} must be at least 1")
        if self.on_stale not in ("drop", "redraw"):
            raise ValueError(f"on_stale={self.on_stale!r} must be 'drop' or 'redraw'")

    @property
    def max_groups(self) -> int:
        return (self.max_staleness + 1) * self.groups_per_version


@dataclass(slots=True, kw_only=True)
class BufferStats:
    """Of one handle's `submit` and `collect`; counters are in groups."""

    num_submitted: int = 0
    num_collected: int = 0
    num_stale_dropped: int = 0
    num_stale_redrawn: int = 0
    num_running: int = 0  # now
    num_ready: int = 0  # finished and not collected, now
    staleness_mean: float = 0.0  # of the tokens of the last collect, in policy versions
    staleness_max: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffered:
    """What has been submitted and not collected: with it a later run goes on (`PoolHandle.put_back`)."""

    ready: list[list[Rollout]]  # finished groups, in the order of submission
    running: list[PendingGroup]  # the others, in that order


@dataclass(frozen=True, slots=True)
class _Running:
    place: int  # in the order of submission
    group: PendingGroup
    policy_version: int  # at which it was submitted: its tokens are of this version or later ones


@dataclass(slots=True)
class _Ready:
    place: int
    group: PendingGroup
    rollouts: list[Rollout]


@dataclass(slots=True)
class _Taken:
    """Groups collected since the version last changed: the trainer has them, but has made no version of them yet."""

    policy_version: int = 0
    num_groups: int = 0


class RolloutBuffer:
    """Groups between `submit` and `collect`; used by one thread."""

    def __init__(
        self,
        submission: Submission,
        limit: StalenessLimit | None,
        policy_version: Callable[[], int],
        reserve: Callable[[list[str]], object],
        num_groups_with_room: Callable[[], int],
        note_delivered: Callable[[list[Rollout]], None],
        note_stats: Callable[[BufferStats], None] = lambda stats: None,
    ) -> None:
        """reserve: takes group ids again that are drawn once more. num_groups_with_room: without a limit, how many
        groups engines have room for. note_delivered: is shown every group just before it is collected. note_stats: is
        shown the counters whenever they have changed."""
        self._submission, self._limit = submission, limit
        self._policy_version, self._reserve, self._num_groups_with_room = policy_version, reserve, num_groups_with_room
        self._note_delivered, self._note_stats = note_delivered, note_stats
        self._running: dict[str, _Running] = {}  # by group id
        self._ready: list[_Ready] = []
        self._taken = _Taken()
        self._stats = BufferStats()

    @property
    def num_groups(self) -> int:
        """On their way or ready."""
        return len(self._running) + len(self._ready)

    def capacity(self) -> int:
        """How many groups may be submitted now."""
        if self._limit is None:
            return max(0, self._num_groups_with_room() - self.num_groups)
        return max(0, self._limit.max_groups - self.num_groups - self._num_taken(self._policy_version()))

    def refuse(self, num_groups: int) -> NoReturn:
        """Raises the ValueError for groups that there is no capacity for."""
        raise ValueError(
            f"{num_groups} groups are more than the {self.capacity()} that may be submitted now "
            f"({self._describe_limit()}): ask has_capacity({num_groups}) first, collect, or sync a new version"
        )

    def submit(self, groups: Sequence[PendingGroup]) -> None:
        """They must have been found to have capacity."""
        version = self._policy_version()
        self._submission.add(list(groups))
        for group in groups:
            self._running[group.request.group_id] = _Running(self._stats.num_submitted, group, version)
            self._stats.num_submitted += 1
        self._note_stats(self._counted())

    def put_back(self, groups: Sequence[tuple[PendingGroup, list[Rollout]]]) -> None:
        """Finished groups, as if they had been submitted and drawn here."""
        for group, rollouts in groups:
            self._ready.append(_Ready(self._stats.num_submitted, group, rollouts))
            self._stats.num_submitted += 1
        self._note_stats(self._counted())

    def discard(self, num_groups: int) -> None:
        """Of the groups collected under the present version, so many will not be trained on: others take their room."""
        self._taken = _Taken(self._taken.policy_version, max(0, self._taken.num_groups - num_groups))

    def buffered(self) -> Buffered:
        """As it stands now; nothing is taken out of it. Raises what `collect` would."""
        self._take(0.0)
        self._ready.sort(key=lambda ready: ready.place)
        running = sorted(self._running.values(), key=lambda running: running.place)
        return Buffered(ready=[ready.rollouts for ready in self._ready], running=[one.group for one in running])

    def collect(self, num_groups: int, timeout: float | None) -> list[list[Rollout]]:
        """The next so many groups to finish that are not too old, in the order in which they were submitted.

        A group that would be too old next time is waited for, rather than that a later one overtakes it.
        Raises ValueError if fewer are on their way, TimeoutError (nothing is lost then), EngineError.
        """
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            version = self._policy_version()
            self._drop_stale(version)
            if len(self._ready) >= num_groups and not self._has_due(version):
                return self._hand_out(num_groups, version)
            self._check_can_come(num_groups)
            remaining = None if deadline is None else deadline - time.monotonic()
            if remaining is not None and remaining <= 0:
                raise TimeoutError(
                    f"{len(self._ready)} of {num_groups} groups are ready after {timeout} s, {len(self._running)} are "
                    "running: raise timeout, or lower max_tokens"
                )
            self._take(remaining)

    def stats(self) -> BufferStats:
        """Counts what has finished until now, collected or not. Raises what `collect` would."""
        self._take(0.0)
        return self._counted()

    def close(self) -> None:
        self._submission.give_up()

    def _counted(self) -> BufferStats:
        """As it stands. Raises nothing, so that what is handed out with it cannot be lost."""
        return replace(self._stats, num_running=len(self._running), num_ready=len(self._ready))

    def _num_taken(self, policy_version: int) -> int:
        if policy_version != self._taken.policy_version:
            self._taken = _Taken(policy_version)
        return self._taken.num_groups

    def _take(self, timeout: float | None) -> None:
        for group, result in self._submission.take(timeout):
            place = self._running.pop(group.request.group_id).place
            self._ready.append(_Ready(place, group, group.rollouts(result)))

    def _has_due(self, policy_version: int) -> bool:
        """Whether a running group must be collected under this version or never."""
        if self._limit is None:
            return False
        last = policy_version - self._limit.max_staleness
        return any(running.policy_version == last for running in self._running.values())

    def _drop_stale(self, policy_version: int) -> None:
        if self._limit is None:
            return
        limit = self._limit.max_staleness
        stale = [ready for ready in self._ready if policy_version - _oldest(ready.rollouts, policy_version) > limit]
        if not stale:
            return
        self._ready = [ready for ready in self._ready if ready not in stale]
        self._log_stale([ready.group.request.group_id for ready in stale], policy_version)
        if self._limit.on_stale == "drop" or not self._draw_again(stale, policy_version):
            self._stats.num_stale_dropped += len(stale)

    def _draw_again(self, stale: list[_Ready], policy_version: int) -> bool:
        """Not so in a pool that drains."""
        try:
            self._reserve([ready.group.request.group_id for ready in stale])
            self._submission.add([ready.group for ready in stale])
        except PoolDrainingError:
            return False
        self._running |= {one.group.request.group_id: _Running(one.place, one.group, policy_version) for one in stale}
        self._stats.num_stale_redrawn += len(stale)
        return True

    def _log_stale(self, group_ids: list[str], policy_version: int) -> None:
        assert self._limit is not None
        fields = {"policy_version": policy_version, "on_stale": self._limit.on_stale, **logs.some_of(group_ids)}
        logger.info("groups are older than max_staleness=%d", self._limit.max_staleness, extra=fields)

    def _check_can_come(self, num_groups: int) -> None:
        if self.num_groups < num_groups:
            raise ValueError(
                f"collect({num_groups}) would wait for ever: {len(self._ready)} groups are ready and "
                f"{len(self._running)} are running ({self._stats.num_stale_dropped} were dropped as too old): "
                "submit more"
            )

    def _hand_out(self, num_groups: int, policy_version: int) -> list[list[Rollout]]:
        self._ready.sort(key=lambda ready: ready.place)
        taken, self._ready = self._ready[:num_groups], self._ready[num_groups:]
        for ready in taken:
            self._note_delivered(ready.rollouts)
        self._taken = _Taken(policy_version, self._num_taken(policy_version) + num_groups)
        self._stats.num_collected += num_groups
        ages = [policy_version - v for ready in taken for one in ready.rollouts for v in one.policy_versions]
        self._stats.staleness_mean, self._stats.staleness_max = sum(ages) / max(1, len(ages)), max(ages, default=0)
        self._note_stats(self._counted())
        return [ready.rollouts for ready in taken]

    def _describe_limit(self) -> str:
        if self._limit is None:
            return f"{self.num_groups} groups fill the engines' queues"
        return (
            f"max_staleness={self._limit.max_staleness} and groups_per_version={self._limit.groups_per_version} allow "
            f"{self._limit.max_groups} uncollected or untrained, {self.num_groups} are on their way"
        )


def _oldest(rollouts: Sequence[Rollout], policy_version: int) -> int:
    """The version of their oldest token."""
    return min((version for rollout in rollouts for version in rollout.policy_versions), default=policy_version)
