"""Router: which engine a group runs on - where its prompt's beginning is cached, if it need not wait for that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

FIRST_PREFIX, LAST_PREFIX = 32, 2**15  # tokens: the beginnings that are remembered have 32, 64, 128, ... of them
REMEMBERED_PREFIXES = 8192  # of an engine
SLACK_TOKENS = 4096  # by which an engine that knows the beginning may be busier than the idlest one


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """What the router must know of a group."""

    group_id: str
    num_tokens: int  # what it may cost an engine
    prefixes: tuple[bytes, ...] = ()  # see `prefixes_of`


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """Where one group runs."""

    group_id: str
    engine_id: int


@dataclass(slots=True)
class _Running:
    group: Routed
    engine_id: int


def prefixes_of(token_ids: Sequence[int]) -> tuple[bytes, ...]:
    """Hashes of a prompt's beginnings of 32, 64, 128, ... tokens, shortest first."""
    data, hashes, length = np.asarray(token_ids, np.int32).tobytes(), [], FIRST_PREFIX
    while length <= min(len(token_ids), LAST_PREFIX):
        hashes.append(blake2b(data[: 4 * length], digest_size=16).digest())
        length *= 2
    return tuple(hashes)


class Router:
    """Outstanding work of every engine. Routing never changes a rollout, only when it is done."""

    def __init__(self, engine_ids: Iterable[int] = ()) -> None:
        self.outstanding_tokens: dict[int, int] = {}
        self._known_prefixes: dict[int, OrderedDict[bytes, None]] = {}
        self._running: dict[str, _Running | None] = {}  # None: reserved, not placed yet
        self._next_group = 0
        for engine_id in engine_ids:
            self.add_engine(engine_id)

    def add_engine(self, engine_id: int) -> None:
        """It may be given work. An engine that comes back has forgotten what it had cached."""
        self.outstanding_tokens.setdefault(engine_id, 0)
        self._known_prefixes[engine_id] = OrderedDict()

    def remove_engine(self, engine_id: int) -> list[str]:
        """It is given no more work; the groups that it leaves behind stay on its account until they are moved."""
        self._known_prefixes.pop(engine_id, None)
        return self.groups_of(engine_id)

    def groups_of(self, engine_id: int) -> list[str]:
        return [name for name, running in self._running.items() if running and running.engine_id == engine_id]

    @property
    def num_groups(self) -> int:
        """Reserved, or placed and not released."""
        return len(self._running)

    def placed_groups(self) -> list[str]:
        """Those that an engine has, or had when it was lost."""
        return [group_id for group_id, running in self._running.items() if running is not None]

    def reserve(self, group_ids: Sequence[str | None]) -> list[str]:
        """Takes the ids, None for the next free one; ValueError, and none taken, if one of them is in use.

        The counter alone fixes an id that is left to the pool, so a rerun draws the same seeds.
        """
        requested = {group_id for group_id in group_ids if group_id is not None}
        in_use = [group_id for group_id in group_ids if group_id in self._running]
        if in_use:
            raise ValueError(f"group_id {in_use[0]!r} is still running: ids must be unique among running groups")
        taken = [self._fresh_id(requested) if group_id is None else group_id for group_id in group_ids]
        self._running |= dict.fromkeys(taken)
        return taken

    def assign(self, groups: Sequence[Routed]) -> list[Assignment]:
        """Places reserved groups, in order."""
        return [self._place(group) for group in groups]

    def move(self, group_ids: Sequence[str], avoid: Collection[int] = ()) -> list[Assignment]:
        """Places groups anew whose engine is gone; those that were released meanwhile are left out."""
        moved = []
        for group_id in group_ids:
            running = self._running.get(group_id)
            if running is not None:
                self.release([group_id])
                moved.append(self._place(running.group, avoid))
        return moved

    def release(self, group_ids: Iterable[str]) -> None:
        """Takes finished (or given up) groups off their engine's account; their ids are free again."""
        for group_id in group_ids:
            running = self._running.pop(group_id, None)
            if running is not None:
                self.outstanding_tokens[running.engine_id] -= running.group.num_tokens

    def is_running(self, group_id: str) -> bool:
        return group_id in self._running

    def locate(self, group_ids: Sequence[str]) -> dict[int, list[str]]:
        """Placed groups by engine; ValueError names ids that are not running."""
        by_engine: dict[int, list[str]] = {}
        for group_id in group_ids:
            running = self._running.get(group_id)
            if running is None:
                raise ValueError(f"no running group has the id {group_id!r}: it is finished or was never submitted")
            by_engine.setdefault(running.engine_id, []).append(group_id)
        return by_engine

    def _place(self, group: Routed, avoid: Collection[int] = ()) -> Assignment:
        engine_id = self._choose(group, [i for i in self._known_prefixes if i not in avoid])
        self.outstanding_tokens[engine_id] += group.num_tokens
        self._running[group.group_id] = _Running(group, engine_id)
        self._remember(engine_id, group.prefixes)
        return Assignment(group_id=group.group_id, engine_id=engine_id)

    def _choose(self, group: Routed, engine_ids: Sequence[int]) -> int:
        """Of the engines that are not much busier than the idlest, the one that knows most of the beginning."""
        assert engine_ids, "the caller waits until an engine may be given work"
        limit = min(self.outstanding_tokens[i] for i in engine_ids) + SLACK_TOKENS
        candidates = [i for i in engine_ids if self.outstanding_tokens[i] <= limit]
        return min(candidates, key=lambda i: (-self._num_known(i, group.prefixes), self.outstanding_tokens[i], i))

    def _num_known(self, engine_id: int, prefixes: Sequence[bytes]) -> int:
        known = self._known_prefixes[engine_id]
        return next((place for place in range(len(prefixes), 0, -1) if prefixes[place - 1] in known), 0)

    def _remember(self, engine_id: int, prefixes: Sequence[bytes]) -> None:
        known = self._known_prefixes[engine_id]
        for prefix in prefixes:
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > REMEMBERED_PREFIXES:
            known.popitem(last=False)

    def _fresh_id(self, requested: set[str]) -> str:
        while True:
            group_id = f"g{self._next_group}"
            self._next_group += 1
            if group_id not in self._running and group_id not in requested:
                return group_id
