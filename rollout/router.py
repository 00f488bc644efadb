"""Router: sends each group to the engine with the fewest outstanding tokens and remembers where it went."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where one group runs."""

    group_id: str
    engine_index: int
    num_tokens: int  # what it may cost the engine


class Router:
    """Outstanding work of every engine. Routing never changes a rollout, only when it is done."""

    def __init__(self, num_engines: int) -> None:
        self.outstanding_tokens = [0] * num_engines
        self._running: dict[str, Assignment] = {}
        self._next_group = 0

    def assign(self, groups: Sequence[tuple[str | None, int]]) -> list[Assignment]:
        """Places (group id or None, tokens) pairs in order; ValueError, and nothing placed, if an id is running."""
        running = [group_id for group_id, _ in groups if group_id in self._running]
        if running:
            raise ValueError(f"group_id {running[0]!r} is still running: ids must be unique among running groups")
        requested = {group_id for group_id, _ in groups if group_id is not None}
        return [
            self._place(self._fresh_id(requested) if group_id is None else group_id, num_tokens)
            for group_id, num_tokens in groups
        ]

    def release(self, group_ids: Sequence[str]) -> None:
        """Takes finished (or given up) groups off their engine's account."""
        for group_id in group_ids:
            assignment = self._running.pop(group_id)
            self.outstanding_tokens[assignment.engine_index] -= assignment.num_tokens

    def locate(self, group_ids: Sequence[str]) -> dict[int, list[str]]:
        """Running groups by engine; ValueError names ids that are not running."""
        unknown = [group_id for group_id in group_ids if group_id not in self._running]
        if unknown:
            raise ValueError(f"no running group has the id {unknown[0]!r}: it is finished or was never submitted")
        by_engine: dict[int, list[str]] = {}
        for group_id in group_ids:
            by_engine.setdefault(self._running[group_id].engine_index, []).append(group_id)
        return by_engine

    def _place(self, group_id: str, num_tokens: int) -> Assignment:
        engine_index = min(range(len(self.outstanding_tokens)), key=lambda i: (self.outstanding_tokens[i], i))
        assignment = Assignment(group_id=group_id, engine_index=engine_index, num_tokens=num_tokens)
        self.outstanding_tokens[engine_index] += num_tokens
        self._running[group_id] = assignment
        return assignment

    def _fresh_id(self, requested: set[str]) -> str:
        # the counter alone fixes the id wherever callers leave ids to the pool, so a rerun draws the same seeds
        while True:
            group_id = f"g{self._next_group}"
            self._next_group += 1
            if group_id not in self._running and group_id not in requested:
                return group_id
