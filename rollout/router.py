"""Router: which engine a group runs on - where its prompt's beginning is cached, if it need not wait for that."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from heapq import heapify, heappop, heappush

import numpy as np

FIRST_PREFIX, LAST_PREFIX = 32, 2**15  # tokens: the beginnings that are remembered have 32, 64, 128, ... of them
REMEMBERED_PREFIXES = 8192  # of an engine
POOL_PREFIXES = 2**20  # of all engines together, at about 350 bytes each
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
    """Outstanding work of every engine. Routing never changes a rollout, only when it is done.

    What a group costs to place does not grow with the number of engines, of which there may be a thousand.
    """

    def __init__(self, engine_ids: Iterable[int] = ()) -> None:
        self.outstanding_tokens: dict[int, int] = {}
        self._by_load: list[tuple[int, int]] = []  # heap of (outstanding tokens, engine id), entries gone by among them
        self._known_prefixes: dict[int, OrderedDict[bytes, None]] = {}  # of engines that are given work
        self._knowing: dict[bytes, list[int]] = {}  # the same by prefix
        self._running: dict[str, _Running | None] = {}  # None: reserved, not placed yet
        self._next_group = 0
        for engine_id in engine_ids:
            self.add_engine(engine_id)

    def add_engine(self, engine_id: int) -> None:
        """It may be given work. An engine that comes back has forgotten what it had cached."""
        self._forget_all(engine_id)
        self._known_prefixes[engine_id] = OrderedDict()
        self._charge(engine_id, 0)

    def remove_engine(self, engine_id: int) -> list[str]:
        """It is given no more work; the groups that it leaves behind stay on its account until they are moved."""
        self._forget_all(engine_id)
        return self.groups_of(engine_id)

    def groups_of(self, engine_id: int) -> list[str]:
        return [name for name, running in self._running.items() if running and running.engine_id == engine_id]

    @property
    def num_engines(self) -> int:
        """That may be given work."""
        return len(self._known_prefixes)

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
                self._charge(running.engine_id, -running.group.num_tokens)

    def is_running(self, group_id: str) -> bool:
        return group_id in self._running

    def is_placed(self, group_id: str) -> bool:
        """Whether an engine has it, or had it when it was lost."""
        return self._running.get(group_id) is not None

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
        engine_id = self._choose(group, avoid)
        self._charge(engine_id, group.num_tokens)
        self._running[group.group_id] = _Running(group, engine_id)
        self._remember(engine_id, group.prefixes)
        return Assignment(group_id=group.group_id, engine_id=engine_id)

    def _choose(self, group: Routed, avoid: Collection[int]) -> int:
        """Of the engines that are not much busier than the idlest, the one that knows most of the beginning."""
        idlest = self._idlest(avoid)
        limit = self.outstanding_tokens[idlest] + SLACK_TOKENS
        for prefix in reversed(group.prefixes):
            if prefix in self._known_prefixes[idlest]:
                return idlest
            knowing = [i for i in self._knowing.get(prefix, ()) if i not in avoid]
            candidates = [load for load in map(self._load, knowing) if load[0] <= limit]
            if candidates:
                return min(candidates)[1]
        return idlest

    def _idlest(self, avoid: Collection[int]) -> int:
        """The one with the smallest id, where there are several."""
        if avoid:
            loads = [self._load(i) for i in self._known_prefixes if i not in avoid]
            assert loads, "the caller waits until an engine may be given work"
            return min(loads)[1]
        while self._by_load and not self._is_current(self._by_load[0]):
            heappop(self._by_load)
        assert self._by_load, "the caller waits until an engine may be given work"
        return self._by_load[0][1]

    def _load(self, engine_id: int) -> tuple[int, int]:
        return self.outstanding_tokens[engine_id], engine_id

    def _is_current(self, load: tuple[int, int]) -> bool:
        return load[1] in self._known_prefixes and load == self._load(load[1])

    def _charge(self, engine_id: int, num_tokens: int) -> None:
        self.outstanding_tokens[engine_id] = self.outstanding_tokens.get(engine_id, 0) + num_tokens
        heappush(self._by_load, self._load(engine_id))
        if len(self._by_load) > 4 * len(self._known_prefixes) + 64:  # those gone by sink, and would pile up
            self._by_load = [self._load(i) for i in self._known_prefixes]
            heapify(self._by_load)

    def _remember(self, engine_id: int, prefixes: Sequence[bytes]) -> None:
        known = self._known_prefixes[engine_id]
        for prefix in prefixes:
            if prefix not in known:
                self._knowing.setdefault(prefix, []).append(engine_id)
            known[prefix] = None
            known.move_to_end(prefix)
        while len(known) > min(REMEMBERED_PREFIXES, POOL_PREFIXES // self.num_engines):
            self._forget(engine_id, known.popitem(last=False)[0])

    def _forget_all(self, engine_id: int) -> None:
        for prefix in self._known_prefixes.pop(engine_id, ()):
            self._forget(engine_id, prefix)

    def _forget(self, engine_id: int, prefix: bytes) -> None:
        knowing = self._knowing[prefix]
        knowing.remove(engine_id)
        if not knowing:
            del self._knowing[prefix]

    def _fresh_id(self, requested: set[str]) -> str:
        while True:
            group_id = f"g{self._next_group}"
            self._next_group += 1
            if group_id not in self._running and group_id not in requested:
                return group_id
