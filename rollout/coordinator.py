"""PoolCoordinator: the small Ray actor that holds what all handles of a pool share, and keeps its engines alive."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import ray

from engine.outputs import EngineStats
from rollout import logs
from rollout.draining import Drain
from rollout.engine_actor import EngineInfo
from rollout.errors import EngineError, Loss, is_loss, translate
from rollout.fleet import EngineRef, EngineSpec, Fault, Fleet, Slot
from rollout.journalling import Journalling, JournalPlan
from rollout.metrics import EXPORT_SECONDS, PoolMetrics
from rollout.requests import Partials
from rollout.router import Assignment, Routed, Router
from rollout.switch import Switch
from rollout.sync_report import CommitReport, SyncMode
from rollout.weight_parcel import WeightParcel
from rollout.weight_transport import Route, WeightTransport

if TYPE_CHECKING:
    from rollout.buffer import BufferStats

logger = logging.getLogger(__name__)

# Of engines under one group, which may be what ends them. What an engine's own code raised, it will raise again.
MAX_LOSSES: dict[Loss, int] = {"died": 5, "failed": 2}
MAX_FAULTS = 100  # the latest, in `PoolStats`
ABORT_SECONDS = 60.0  # in which a group that is to be aborted must reach an engine
LOOK_SECONDS = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where groups run, and what was drawn for them before."""

    assignments: list[Assignment]
    engines: dict[int, EngineRef]  # by engine id, those of the assignments
    num_engines: int  # that serve
    partials: Partials = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolFacts:
    """What the handles of a pool know of it once its first engines serve."""

    engine_info: EngineInfo  # of one engine; the others differ in process, node and threads alone
    journalling: Journalling | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PoolStats:
    """A pool at one moment; counters are since it was built."""

    engines: tuple[EngineStats, ...]  # of those that serve, by engine id
    num_engines_starting: int  # or waiting for a place in the cluster, or tried again after failures
    num_groups_running: int  # reserved or placed, by all handles
    is_draining: bool  # and takes no new groups
    policy_version: int
    num_restarts: int  # of engines that died or hung
    num_redrawn_groups: int  # that were placed anew after one
    faults: tuple[Fault, ...]  # the latest


@ray.remote(num_cpus=0)
class PoolCoordinator:
    """Routes groups, knows the policy version, switches all engines to staged weights, and replaces those that fail."""

    def __init__(self, spec: EngineSpec, weight_transport: WeightTransport) -> None:
        logs.configure(pool=spec.pool_name, actor="coordinator")
        self._router = Router()
        self._metrics = PoolMetrics(spec.pool_name)
        self._is_open = asyncio.Event()
        self._facts: PoolFacts | Exception | None = None
        self._exporter: asyncio.Task | None = None
        self._looked_at: dict[int, asyncio.Task] = {}  # engines whose stats are on their way
        self._fleet = Fleet(spec, self._catch_up, self._on_serving, self._on_lost)
        self._switch = Switch(self._fleet, self._router, self._keep, weight_transport)
        self._drain = Drain(self._router, self.abort)
        self._partials: Partials = {}
        self._losses: dict[str, Counter[Loss]] = {}  # by group: the engines that it has lost
        self._num_redrawn_groups = 0
        self._handing_over: dict[int, asyncio.Event] = {}  # engines that retire

    # --- engines ---

    async def open(self, num_engines: int, journal: JournalPlan | None) -> None:
        """Starts the first engines. From then on handles may work, and switches are written down in the journal."""
        try:
            [first, *_] = await self.scale(num_engines)
            journalling = None if journal is None else journal.begin(first)
            if journalling is not None:
                self._switch.keep_journal(journalling)
            self._facts = PoolFacts(engine_info=first, journalling=journalling)
        except Exception as error:
            self._facts = error
        self._is_open.set()

    async def facts(self) -> PoolFacts:
        """Waits for the first engines; raises what kept them from starting."""
        await self._is_open.wait()
        if isinstance(self._facts, Exception):
            raise self._facts
        return self._facts

    async def scale(self, num_engines: int) -> list[EngineInfo]:
        """Starts or ends engines; the groups of those that end go on elsewhere. What the serving engines say."""
        if self._exporter is None:
            self._exporter = self._fleet.spawn(self._export_metrics())
        for slot in reversed(await self._fleet.scale(num_engines)):
            await self._retire(slot)
        return await self.engine_infos()

    async def engines(self) -> list[EngineRef]:
        return [slot.ref for slot in self._fleet.serving()]

    async def engine_infos(self) -> list[EngineInfo]:
        return [slot.info for slot in self._fleet.serving() if slot.info is not None]

    async def stats(self) -> PoolStats:
        engines = await asyncio.gather(*(self._ask(slot.ref, "stats") for slot in self._fleet.serving()))
        return PoolStats(
            engines=tuple(stats for stats in engines if stats is not None),
            num_engines_starting=self._fleet.num_starting,
            num_groups_running=self._router.num_groups,
            is_draining=self._drain.is_on,
            policy_version=self._switch.policy_version,
            num_restarts=self._fleet.num_restarts,
            num_redrawn_groups=self._num_redrawn_groups,
            faults=tuple(self._fleet.faults[-MAX_FAULTS:]),
        )

    async def note_staleness(self, stats: BufferStats, max_staleness: int | None) -> None:
        self._metrics.note_staleness(stats, max_staleness)

    async def shutdown(self) -> list[Any]:
        self._switch.close()
        return [*self._fleet.shutdown(), *self._switch.stores.values()]

    async def _retire(self, slot: Slot) -> None:
        fields = {"engine_id": slot.engine_id, "incarnation": slot.incarnation}
        logger.info("engine %d retires", slot.engine_id, extra=fields)
        if slot.state != "serving":  # it has no groups, and may never have a place in the cluster
            self._fleet.remove(slot)
            return
        self._handing_over[slot.engine_id] = asyncio.Event()
        self._fleet.retire(slot)
        partials = await self._ask(slot.ref, "retire")
        self._keep(partials or {})
        logger.info(
            "engine %d has handed over its groups", slot.engine_id, extra=fields | logs.some_of(list(partials or {}))
        )
        self._handing_over.pop(slot.engine_id).set()
        self._fleet.remove(slot)

    async def _ask(self, ref: EngineRef, method: str, *args: Any) -> Any:
        """The engine's answer; None where it is lost, which the fleet then knows."""
        try:
            return await getattr(ref.actor, method).remote(*args)
        except Exception as error:
            if not is_loss(error):
                raise translate(str(ref), error) from error
            self._fleet.lose(ref.engine_id, ref.incarnation, str(translate(str(ref), error)))
            return None

    def _on_serving(self, slot: Slot) -> None:
        self._router.add_engine(slot.engine_id)

    def _on_lost(self, slot: Slot) -> None:
        self._metrics.show_lost(slot.engine_id, slot.incarnation)
        self._switch.note_lost(self._router.remove_engine(slot.engine_id))

    async def _export_metrics(self) -> None:
        """An engine that takes its time is asked again once it has answered, and keeps no other waiting."""
        while True:
            for slot in self._fleet.serving():
                if slot.engine_id not in self._looked_at or self._looked_at[slot.engine_id].done():
                    self._looked_at[slot.engine_id] = self._fleet.spawn(self._export_engine(slot, slot.ref))
            self._metrics.show_pool(
                num_groups_running=self._router.num_groups,
                num_engines_serving=len(self._fleet.serving()),
                num_engines_starting=self._fleet.num_starting,
                policy_version=self._switch.policy_version,
                num_restarts=self._fleet.num_restarts,
                num_redrawn_groups=self._num_redrawn_groups,
                faults=self._fleet.faults,
            )
            await asyncio.sleep(EXPORT_SECONDS)

    async def _export_engine(self, slot: Slot, ref: EngineRef) -> None:
        try:
            stats = await ref.actor.stats.remote()
        except Exception:
            return  # whoever waits for its end hears of it
        if slot.state == "serving" and slot.ref == ref:  # else what it had is gone
            self._metrics.show_engine(ref.engine_id, ref.incarnation, stats)

    # --- groups ---

    async def reserve(self, group_ids: Sequence[str | None]) -> list[str]:
        self._drain.check_admits(group_ids)
        return self._router.reserve(group_ids)

    async def assign(self, groups: Sequence[Routed]) -> Placement:
        await self._fleet.wait_for_serving()
        self._drain.check_admits([group.group_id for group in groups])
        return self._placement(self._router.assign(groups))

    async def release(self, group_ids: Sequence[str]) -> None:
        self._router.release(group_ids)
        for group_id in group_ids:
            self._partials.pop(group_id, None)
            self._losses.pop(group_id, None)
        self._switch.note_released(group_ids)

    async def recover(self, ref: EngineRef, loss: Loss, cause: str, group_ids: Sequence[str]) -> Placement:
        """Where groups go on whose engine a caller has lost, and what they go on from.

        Raises EngineError for a group that has lost too many engines, and where no engine is left.
        """
        self._fleet.lose(ref.engine_id, ref.incarnation, cause)
        if ref.engine_id in self._handing_over:
            await self._handing_over[ref.engine_id].wait()
        for group_id in group_ids:
            losses = self._losses.setdefault(group_id, Counter())
            losses[loss] += 1
            if loss in MAX_LOSSES and losses[loss] >= MAX_LOSSES[loss]:
                logger.error("group %s is given up", group_id, extra={"group_id": group_id, "cause": cause})
                raise EngineError(f"{cause}; that was engine number {losses[loss]} under group {group_id!r}: given up")
        await self._fleet.wait_for_serving(besides=self._switch.finishing_engines)
        assignments = self._router.move(group_ids, avoid=self._switch.finishing_engines())
        self._num_redrawn_groups += len(assignments)
        self._log_moved(ref, cause, assignments)
        self._switch.note_moved([assignment.group_id for assignment in assignments])
        return self._placement(assignments)

    def _log_moved(self, ref: EngineRef, cause: str, assignments: list[Assignment]) -> None:
        fields = {"engine_id": ref.engine_id, "incarnation": ref.incarnation, "cause": cause}
        moved = logs.some_of([assignment.group_id for assignment in assignments])
        logger.warning("groups of engine %d go on elsewhere", ref.engine_id, extra=fields | moved)

    async def abort(self, group_ids: Sequence[str]) -> None:
        """Ends running groups with what they have; ValueError for ids that are not running.

        A group may be on its way to an engine, or from a lost one to another, so one that its engine does not have is
        asked for again, until it is ended or its caller has it. Raises EngineError if that takes too long.
        """
        running = self._router.locate(group_ids)
        deadline = time.monotonic() + ABORT_SECONDS
        while remaining := await self._abort_at_engines(running):
            if time.monotonic() > deadline:
                raise EngineError(
                    f"groups {remaining} have not reached an engine within {ABORT_SECONDS:.0f} s, so they are not "
                    f"aborted: their caller is gone or hangs"
                )
            await asyncio.sleep(LOOK_SECONDS)
            running = self._router.locate([name for name in remaining if self._router.is_placed(name)])

    async def _abort_at_engines(self, running: dict[int, list[str]]) -> list[str]:
        """Asks every engine for its groups; returns those that it does not have."""
        refs = {slot.engine_id: slot.ref for slot in self._fleet.serving()}
        asked = {i: names for i, names in running.items() if i in refs}
        answers = await asyncio.gather(*(self._ask(refs[i], "abort", names) for i, names in asked.items()))
        ended = {name for answer in answers for name in answer or ()}
        return [name for names in running.values() for name in names if name not in ended]

    async def drain(self, timeout: float) -> list[str]:
        return await self._drain.run(timeout)

    def _placement(self, assignments: list[Assignment]) -> Placement:
        used = {assignment.engine_id for assignment in assignments}
        partials = {a.group_id: self._partials[a.group_id] for a in assignments if a.group_id in self._partials}
        return Placement(
            assignments=assignments,
            engines={i: self._fleet.slots[i].ref for i in used},
            num_engines=self._router.num_engines,
            partials=partials,
        )

    def _keep(self, partials: Partials) -> None:
        """What an engine has handed over, for groups that are still wanted."""
        self._partials |= {name: drawn for name, drawn in partials.items() if self._router.is_running(name)}

    # --- weights ---

    async def policy_version(self) -> int:
        return self._switch.policy_version

    async def begin_sync(self, sync_id: str, policy_version: int, rollback: bool, sender_node: str) -> Route:
        return await self._switch.begin(sync_id, policy_version, rollback, sender_node)

    async def stage(self, sync_id: str, number: int, node_id: str, parcel: WeightParcel) -> None:
        await self._switch.stage(sync_id, number, node_id, parcel)

    async def commit(self, sync_id: str, mode: SyncMode, checksum: bytes, num_bytes: int = 0) -> list[CommitReport]:
        return await self._switch.commit(sync_id, mode, checksum, num_bytes)

    async def weight_stores(self) -> dict[str, Any]:
        """WeightStore actors by node id; none before the first sync that needs them."""
        return dict(self._switch.stores)

    async def end_sync(self, sync_id: str) -> None:
        self._switch.end(sync_id)

    async def _catch_up(self, slot: Slot) -> bool:
        return await self._switch.catch_up(slot)
