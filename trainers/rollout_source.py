"""Rollout sources: where a loop's groups come from - drawn when asked for, one batch ahead, or all the time.

A loop fills its source when new weights are in force, takes the groups of a step, trains, and settles the source
before it hands over the next weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rollout import PoolHandle, Rollout, SamplingParams
from rollout.sync_report import SyncMode
from trainers.prompt_order import PromptOrder, Row

LoopMode = Literal["sync", "lagged", "async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """The samples of one prompt."""

    row: Row
    rollouts: list[Rollout]


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceState:
    """What a source has been asked for and has not given: with it another one goes on."""

    position: int  # in the order of prompts
    ready: tuple[list[Rollout], ...] = ()  # finished groups, in the order in which they are to be given
    running: tuple[int, ...] = ()  # positions of prompts whose groups have not finished


class SynchronousSource:
    """Draws groups when they are asked for, under the weights in force."""

    sync_mode: SyncMode = "recompute"

    def __init__(self, pool: PoolHandle, order: PromptOrder, params: SamplingParams, num_prompts: int) -> None:
        """params: of every prompt. num_prompts: groups that a step is made of, by which groups are named."""
        self.pool, self.order, self.params, self.num_prompts = pool, order, params, num_prompts

    def fill(self) -> None:
        """Hands the engines what may be drawn from now on."""

    def take(self, num_groups: int) -> list[Drawn]:
        """The next groups."""
        first = self.order.position
        positions = range(first, first + num_groups)
        rows, group_ids = self.order.take(num_groups), self._names(positions)
        groups = self.pool.generate([row["prompt"] for row in rows], self.params, group_ids=group_ids)
        return [Drawn(row=row, rollouts=group) for row, group in zip(rows, groups, strict=True)]

    def discard(self, num_groups: int) -> None:
        """So many of the groups that were taken will not be trained on."""

    def settle(self) -> None:
        """Waits for what must not see the next weights."""

    def state(self) -> SourceState:
        """To be asked for between two steps."""
        return SourceState(position=self.order.position)

    def restore(self, state: SourceState) -> None:
        """Goes on from a state, once the pool has the weights that were in force then."""
        self.order.seek(state.position)

    def _names(self, positions: Sequence[int]) -> list[str]:
        """With the run's seed a group's name fixes its samples."""
        return [f"step{p // self.num_prompts + 1}-prompt{p % self.num_prompts}" for p in positions]

    def _submit(self, positions: Sequence[int]) -> None:
        self.pool.submit(
            [self.order.row(position)["prompt"] for position in positions],
            self.params,
            group_ids=self._names(positions),
            metadata=[{"position": position} for position in positions],
        )

    def _drawn(self, groups: Sequence[list[Rollout]]) -> list[Drawn]:
        return [Drawn(row=self.order.row(group[0].metadata["position"]), rollouts=group) for group in groups]


class LaggedSource(SynchronousSource):
    """Draws every batch wholly under the weights that are `lag` versions behind its turn: engines and trainer work at
    the same time, and the run repeats to the bit.
    """

    def __init__(
        self, pool: PoolHandle, order: PromptOrder, params: SamplingParams, num_prompts: int, lag: int
    ) -> None:
        super().__init__(pool, order, params, num_prompts)
        self.lag = lag
        self._ready: list[list[Rollout]] = []
        self._num_taken = 0  # groups, of all that were asked for

    def fill(self) -> None:
        wanted = self._num_taken + (self.lag + 1) * self.num_prompts
        if self.order.position < wanted:
            self._submit(range(self.order.position, wanted))
            self.order.seek(wanted)

    def take(self, num_groups: int) -> list[Drawn]:
        if len(self._ready) < num_groups:
            self._ready += self.pool.collect(num_groups - len(self._ready))
        taken, self._ready = self._ready[:num_groups], self._ready[num_groups:]
        self._num_taken += num_groups
        return self._drawn(taken)

    def settle(self) -> None:
        num_left = self.order.position - self._num_taken - len(self._ready)
        if num_left:
            self._ready += self.pool.collect(num_left)

    def state(self) -> SourceState:
        """After `settle` and before `fill`: nothing runs."""
        assert len(self._ready) == self.order.position - self._num_taken, "groups are still being drawn"
        return SourceState(position=self.order.position, ready=tuple(self._ready))

    def restore(self, state: SourceState) -> None:
        self.order.seek(state.position)
        self._ready = list(state.ready)
        self._num_taken = state.position - len(state.ready)


class InFlightSource(SynchronousSource):
    """Keeps the engines busy all the time: what runs when new weights come goes on under them.

    The pool's `max_staleness` bounds how many versions a token may lie behind when it is trained on.
    """

    def __init__(
        self, pool: PoolHandle, order: PromptOrder, params: SamplingParams, num_prompts: int, sync_mode: SyncMode
    ) -> None:
        super().__init__(pool, order, params, num_prompts)
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
        return SourceState(
            position=self.order.position,
            ready=tuple(buffered.ready),
            running=tuple(group.metadata["position"] for group in buffered.running),
        )

    def restore(self, state: SourceState) -> None:
        """What had not finished is drawn anew, under the weights in force now."""
        self.order.seek(state.position)
        self.pool.put_back(state.ready)
        if state.running:
            self._submit(state.running)


RolloutSource = SynchronousSource
