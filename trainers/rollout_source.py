"""Rollout sources: where a loop's groups come from - drawn when asked for, one batch ahead, or all the time.

A loop fills its source when new weights are in force, takes the groups of a step, trains, and settles the source
before it hands over the next weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rollout import PoolHandle, Rollout, SamplingParams
from rollout.sync_report import SyncMode
from trainers.prompt_order import PromptOrder
from trainers.untrained_groups import UntrainedGroup

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The samples of one prompt."""

    row: Row
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What a source has been asked for and has not given: with it another one goes on."""

    position: int  # of the order of prompts
    groups: tuple[UntrainedGroup, ...] = ()  # the finished ones first, in the order in which they are to be given


class RolloutSource:
    """What the sources share: the order of prompts, the names of groups, and the way through the pool's buffer."""

    sync_mode: SyncMode = "recompute"

    def __init__(
        self, pool: PoolHandle, rows: Sequence[Row], seed: int, params: SamplingParams, num_prompts: int
    ) -> None:
        """rows, seed: the data set, and what its order comes from. params: of every prompt. num_prompts: groups that a
        step is made of, by which groups are named."""
        self.pool, self.rows, self.order = pool, rows, PromptOrder(len(rows), seed)
        self.params, self.num_prompts = params, num_prompts

    def fill(self) -> None:
        """Hands the engines what may be drawn from now on."""

    def take(self, num_groups: int) -> list[Drawn]:
        """The next groups."""
        raise NotImplementedError

    def discard(self, num_groups: int) -> None:
        """So many of the groups that were taken will not be trained on."""

    @property
    def is_settled(self) -> bool:
        """Whether nothing runs that must not see the next weights."""
        return True

    def settle(self) -> None:
        """Waits for it."""

    def state(self) -> SourceState:
        """For a checkpoint: to be asked for when the source is settled and not filled again."""
        return SourceState(position=self.order.position)

    def restore(self, state: SourceState) -> None:
        """Goes on from a state, once the pool has the weights that were in force then."""
        self.order.seek(state.position)

    def _names(self, positions: Sequence[int]) -> list[str]:
        """With the run's seed a group's name fixes its samples."""
        return [f"step{p // self.num_prompts + 1}-prompt{p % self.num_prompts}" for p in positions]

    def _submit(self, positions: Sequence[int]) -> None:
        self.pool.submit(
            [self._row(position)["prompt"] for position in positions],
            self.params,
            group_ids=self._names(positions),
            metadata=[{"position": position} for position in positions],
        )

    def _drawn(self, groups: Sequence[list[Rollout]]) -> list[Drawn]:
        return [Drawn(row=self._row(_position(group[0].metadata)), rollouts=group) for group in groups]

    def _row(self, position: int) -> Row:
        return self.rows[self.order.index_at(position)]

    def _untrained(self, rollouts: list[Rollout]) -> UntrainedGroup:
        first = rollouts[0]
        return UntrainedGroup(position=_position(first.metadata), group_id=first.group_id, rollouts=tuple(rollouts))


class SynchronousSource(RolloutSource):
    """Draws groups when they are asked for, under the weights in force."""

    def take(self, num_groups: int) -> list[Drawn]:
        group_ids = self._names(range(self.order.position, self.order.position + num_groups))
        rows = [self.rows[index] for index in self.order.take(num_groups)]
        groups = self.pool.generate([row["prompt"] for row in rows], self.params, group_ids=group_ids)
        return [Drawn(row=row, rollouts=group) for row, group in zip(rows, groups, strict=True)]


class LaggedSource(RolloutSource):
    """Draws every batch wholly under the weights that are `lag` versions behind its turn: engines and trainer work at
    the same time, and the run repeats to the bit.
    """

    def __init__(
        self,
        pool: PoolHandle,
        rows: Sequence[Row],
        seed: int,
        params: SamplingParams,
        num_prompts: int,
        lag: int,
    ) -> None:
        super().__init__(pool, rows, seed, params, num_prompts)
        self.lag = lag
        self._finished: dict[int, list[Rollout]] = {}  # by position, what was not taken
        self._num_taken = 0  # groups, of all that were asked for

    def fill(self) -> None:
        wanted = self._num_taken + (self.lag + 1) * self.num_prompts
        if self.order.position < wanted:
            self._submit(range(self.order.position, wanted))
            self.order.seek(wanted)

    def take(self, num_groups: int) -> list[Drawn]:
        positions = range(self._num_taken, self._num_taken + num_groups)
        while not self._finished.keys() >= set(positions):  # those of later batches may end before them
            self._collect(1)
        self._num_taken += num_groups
        return self._drawn([self._finished.pop(position) for position in positions])

    @property
    def is_settled(self) -> bool:
        return self._num_running == 0

    def settle(self) -> None:
        if self._num_running:
            self._collect(self._num_running)

    def state(self) -> SourceState:
        assert self.is_settled, "groups are still being drawn"
        groups = [self._untrained(self._finished[position]) for position in sorted(self._finished)]
        return SourceState(position=self.order.position, groups=tuple(groups))

    def restore(self, state: SourceState) -> None:
        self.order.seek(state.position)
        self._finished = {group.position: list(group.rollouts or ()) for group in state.groups}
        self._num_taken = state.position - len(state.groups)

    @property
    def _num_running(self) -> int:
        return self.order.position - self._num_taken - len(self._finished)

    def _collect(self, num_groups: int) -> None:
        self._finished |= {_position(group[0].metadata): group for group in self.pool.collect(num_groups)}


class InFlightSource(RolloutSource):
    """Keeps the engines busy all the time: what runs when new weights come goes on under them.

    The pool's `max_staleness` bounds how many versions a token may lie behind when it is trained on.
    """

    def __init__(
        self,
        pool: PoolHandle,
        rows: Sequence[Row],
        seed: int,
        params: SamplingParams,
        num_prompts: int,
        sync_mode: SyncMode,
    ) -> None:
        super().__init__(pool, rows, seed, params, num_prompts)
        self.sync_mode = sync_mode

    def fill(self) -> None:
        first = self.order.position
        if num_groups := self.pool.capacity():
            self._submit(range(first, first + num_groups))
            self.order.seek(first + num_groups)

    def take(self, num_groups: int) -> list[Drawn]:
        groups: list[list[Rollout]] = []
        while len(groups) < num_groups:
            self.fill()  # in place of groups that were discarded, or dropped as too old
            groups += self.pool.collect(1)
        return self._drawn(groups)

    def discard(self, num_groups: int) -> None:
        self.pool.discard(num_groups)

    def state(self) -> SourceState:
        buffered = self.pool.buffered()
        running = [
            UntrainedGroup(position=_position(group.metadata), group_id=group.request.group_id)
            for group in buffered.running
        ]
        return SourceState(position=self.order.position, groups=(*map(self._untrained, buffered.ready), *running))

    def restore(self, state: SourceState) -> None:
        """What had not finished is drawn anew, under the weights in force now."""
        self.order.seek(state.position)
        self.pool.put_back([list(group.rollouts) for group in state.groups if group.rollouts is not None])
        running = [group.position for group in state.groups if group.rollouts is None]
        if running:
            self._submit(running)


def _position(metadata: Mapping[str, Any]) -> int:
    """Of a submitted group's prompt in the order."""
    return metadata["position"]
