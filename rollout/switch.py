"""Switch: takes all engines from one version of the weights to the next - staged first, then committed, then forward.

Until the commit, whatever fails leaves every engine on the old weights. The commit is one assignment in this process:
from then on the new version is in force, and an engine that fails to take it is replaced by one that starts with it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError

from rollout.errors import EngineError, is_loss, translate
from rollout.fleet import EngineRef, Fleet, Slot
from rollout.journal import Journal
from rollout.journalling import Journalling
from rollout.requests import Partials
from rollout.router import Router
from rollout.sync_report import CommitReport, SyncMode
from rollout.weight_parcel import ObjectParcel, SegmentParcel, WeightParcel, WeightsUnreachableError
from rollout.weight_store import start_weight_stores
from rollout.weight_transport import Route, WeightTransport, keep_weights

if TYPE_CHECKING:
    import torch

    from rollout.weight_archive import WeightArchive

logger = logging.getLogger(__name__)

LEASE_SECONDS = 120.0  # after which a sync that nobody goes on with gives way to the next
NO_PLACE_SECONDS = 15.0  # for which lost groups wait for a replacement before an engine that has finished draws them
LOST_CALLER_SECONDS = 60.0  # for which a lost engine's groups may fail to go on elsewhere: their caller may be gone too

Bucket = dict[str, WeightParcel]  # one bucket's parcels, by node id
Life = tuple[int, int]  # engine id and incarnation


@dataclass(slots=True)
class _Sync:
    """Weights on their way."""

    sync_id: str
    policy_version: int
    buckets: list[Bucket] = field(default_factory=list)
    staged: dict[Life, set[int]] = field(default_factory=dict)  # numbers of the buckets that an engine holds
    began: float = field(default_factory=time.monotonic)
    touched: float = field(default_factory=time.monotonic)
    is_committing: bool = False


@dataclass(frozen=True, slots=True)
class _Weights:
    """The weights in force, for engines that come later."""

    policy_version: int
    sync_id: str
    buckets: list[Bucket]


class Switch:
    """Runs in the coordinator's event loop; one sync at a time, in the order in which they ask."""

    def __init__(
        self, fleet: Fleet, router: Router, keep: Callable[[Partials], None], transport: WeightTransport
    ) -> None:
        """keep: takes what an engine had drawn before it acknowledged new weights. transport: of the weights."""
        self.stores: dict[str, Any] = {}  # WeightStore actors by node id
        self._transport: WeightTransport = transport
        self.policy_version = 0  # what engines start with
        self._fleet, self._router, self._keep = fleet, router, keep
        self._weights: _Weights | None = None  # None: those of the model's directory
        self._sync: _Sync | None = None
        self._turn = asyncio.Condition()
        self._finishing: set[Life] = set()  # engines that let nothing new begin, until they switch
        self._journal: Journal | None = None
        self._archive: WeightArchive | None = None
        self._caught_up: dict[Life, CommitReport] = {}  # engines that came later
        self._lost_groups: set[str] = set()  # of engines that were lost; where a sync waits, they end before it
        self._moved_groups: set[str] = set()  # of these, those that go on

    async def begin(self, sync_id: str, policy_version: int, rollback: bool, sender_node: str) -> Route:
        """Waits for the sync before it; how its weights are to travel. ValueError unless the version is new."""
        self._check_version(policy_version, rollback)
        async with self._turn:
            while self._sync is not None and not self._is_abandoned(self._sync):
                with_lease = asyncio.wait_for(self._turn.wait(), LEASE_SECONDS / 10)
                try:
                    await with_lease
                except TimeoutError:
                    continue
            if self._sync is not None:
                self._discard(self._sync)
            self._check_version(policy_version, rollback)
            self._sync = _Sync(sync_id, policy_version)
        logger.info("weight sync begun", extra=_fields(self._sync))
        # the sender's node holds the weights too, for engines that come when all that have them are gone
        nodes = tuple(dict.fromkeys([*(slot.node_id for slot in self._fleet.serving()), sender_node]))
        self._forget_dead_nodes()
        missing = set(nodes) - self.stores.keys() if self._transport != "object_store" else ()
        self.stores |= start_weight_stores(sorted(missing), self._fleet.spec.pool_name)
        return Route(transport=self._transport, engine_nodes=nodes, stores=dict(self.stores))

    async def stage(self, sync_id: str, number: int, node_id: str, parcel: WeightParcel) -> None:
        """First phase: every engine that serves on the node holds the bucket of this number and has verified it.

        Raises WeightsUnreachableError where they cannot open the parcel: another one may be given for it.
        """
        sync = self._current(sync_id)
        while len(sync.buckets) <= number:
            sync.buckets.append({})
        sync.buckets[number][node_id] = parcel
        here = [slot for slot in self._fleet.serving() if slot.node_id == node_id]
        await asyncio.gather(*(self._stage_at(slot, sync, number) for slot in here))

    async def commit(self, sync_id: str, mode: SyncMode, checksum: bytes, num_bytes: int = 0) -> list[CommitReport]:
        """Second phase; it runs to its end whatever becomes of the caller. Reports of the engines that switched.

        checksum: of the weights, for the journal. num_bytes: of them, for the log.
        JournalError, with every engine on its old weights, if the journal is full.
        """
        sync = self._current(sync_id)
        sync.is_committing = True
        try:
            if mode == "wait":
                await self._finish_started()
            await self._fleet.wait_for_serving()
            numbers = range(len(sync.buckets))
            await asyncio.gather(*(self._stage_at(slot, sync, i) for slot in self._fleet.serving() for i in numbers))
            logger.info("weights staged", extra=_fields(sync))
            await self._write_down(sync, mode, checksum)
            self.policy_version = sync.policy_version
            self._weights = _Weights(sync.policy_version, sync_id, sync.buckets)
            await asyncio.gather(*keep_weights(self.stores, sync_id), return_exceptions=True)
            refs = [slot.ref for slot in self._fleet.serving()]
            engine_mode = "recompute" if mode == "wait" else mode
            reports = await asyncio.gather(*(self._commit_at(ref, sync, engine_mode) for ref in refs))
            taken = [report for report in reports if report is not None]
            _log_commit(sync, mode, num_bytes, taken)
            return taken or [await self._first_caught_up()]
        finally:
            await self._stop_finishing()
            await self._clear(sync)

    def end(self, sync_id: str) -> None:
        """Drops a sync that was not committed; nothing happens if there is none."""
        if self._sync is not None and self._sync.sync_id == sync_id and not self._sync.is_committing:
            logger.warning("weight sync dropped", extra=_fields(self._sync))
            self._discard(self._sync)
            self._fleet.spawn(self._clear(self._sync))

    async def catch_up(self, slot: Slot) -> bool:
        """Gives a fresh engine the weights in force; whether they still are when it has them."""
        weights, ref = self._weights, slot.ref
        if weights is not None:
            sync = _Sync(f"catch-up-{weights.policy_version}", weights.policy_version)
            for bucket in weights.buckets:
                await self._hand_over_what_is_left(slot, sync.sync_id, bucket)
            report = await ref.actor.commit_weights.remote(sync.sync_id, weights.policy_version, "recompute")
            self._caught_up[_life(ref)] = report
        return self._weights is weights

    def keep_journal(self, journalling: Journalling) -> None:
        self._journal, self._archive = journalling.open_journal(), journalling.open_archive()

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()

    async def _write_down(self, sync: _Sync, mode: SyncMode, checksum: bytes) -> None:
        """Before the version is in force; so the journal knows every version that ever drew a token."""
        journal, archive, path = self._journal, self._archive, None
        if journal is None:
            return
        if archive is not None and archive.wants(sync.policy_version):
            here = ray.get_runtime_context().get_node_id()
            parcels = [await self._parcel_for(here, bucket) for bucket in sync.buckets]
            path = await asyncio.to_thread(archive.save, sync.policy_version, _tensors(parcels))
        await asyncio.to_thread(journal.write_switch, sync.policy_version, checksum.hex(), mode, path)

    async def _first_caught_up(self) -> CommitReport:
        """No engine lived through the switch: the first of those that come after."""
        await self._fleet.wait_for_serving()
        return self._caught_up[_life(self._fleet.serving()[0].ref)]

    # --- requests that must end under the old weights ---

    def finishing_engines(self) -> set[int]:
        """Where a group that must end under the old weights would not begin."""
        return {engine_id for engine_id, _ in self._finishing}

    def note_lost(self, group_ids: Iterable[str]) -> None:
        """Also before a sync: what begins anew too late would change sides at an engine that ends what it has begun."""
        group_ids = set(group_ids)
        self._lost_groups |= group_ids
        self._moved_groups -= group_ids

    def note_moved(self, group_ids: Iterable[str]) -> None:
        """They go on, at an engine that ends them before it switches."""
        self._moved_groups.update(self._lost_groups.intersection(group_ids))

    def note_released(self, group_ids: Iterable[str]) -> None:
        self._lost_groups.difference_update(group_ids)
        self._moved_groups.difference_update(group_ids)

    async def _finish_started(self) -> None:
        """Every engine ends what it has begun. What a lost one had is drawn again first, by its replacement."""
        logger.info("engines end what they have begun", extra=_fields(self._sync))
        while True:
            await self._wait_for_lost_groups()
            todo = [slot for slot in self._fleet.serving() if _life(slot.ref) not in self._finishing]
            if not todo and not self._lost_groups:
                return
            await asyncio.gather(*(self._finish_at(slot) for slot in todo))

    async def _finish_at(self, slot: Slot) -> None:
        ref = slot.ref
        self._finishing.add(_life(ref))
        try:
            await ref.actor.finish_started.remote()
        except Exception as error:
            self._finishing.discard(_life(ref))
            self._fleet.lose(ref.engine_id, ref.incarnation, str(translate(str(ref), error)))

    async def _wait_for_lost_groups(self) -> None:
        last_move = last_place = time.monotonic()
        counts = ()  # of lost and moved groups
        while self._lost_groups:
            await asyncio.sleep(0.02)
            has_place = any(_life(slot.ref) not in self._finishing for slot in self._fleet.serving())
            if has_place:
                last_place = time.monotonic()
            elif time.monotonic() - last_place > NO_PLACE_SECONDS:
                await self._reopen_one()
            before, counts = counts, (len(self._lost_groups), len(self._moved_groups))
            if not has_place or counts != before:
                last_move = time.monotonic()
            if time.monotonic() - last_move > LOST_CALLER_SECONDS:
                self._lost_groups.clear()  # those that were moved have begun by now, and end before the switch like all
                self._moved_groups.clear()

    async def _reopen_one(self) -> None:
        """Their node may never come back, so lost groups go to an engine that has finished; it finishes once more."""
        ref = next((slot.ref for slot in self._fleet.serving()), None)
        if ref is None:
            return
        try:
            await ref.actor.resume.remote()
        except Exception as error:
            self._fleet.lose(ref.engine_id, ref.incarnation, str(translate(str(ref), error)))
        self._finishing.discard(_life(ref))
        await self._fleet.tell()

    async def _stop_finishing(self) -> None:
        """Engines that did not switch go on under the weights they have."""
        paused, self._finishing = self._finishing, set()
        refs = [slot.ref for slot in self._fleet.serving() if _life(slot.ref) in paused]
        await asyncio.gather(*(ref.actor.resume.remote() for ref in refs), return_exceptions=True)

    # --- one engine ---

    async def _stage_at(self, slot: Slot, sync: _Sync, number: int) -> None:
        """Gives an engine a bucket, if it has not got it: one that is new lacks all of them."""
        ref = slot.ref
        staged = sync.staged.setdefault(_life(ref), set())
        if number in staged:
            return
        staged.add(number)
        try:
            await self._hand_over(slot, sync.sync_id, sync.buckets[number])
            sync.touched = time.monotonic()
        except Exception as error:
            staged.discard(number)
            if _is_unreachable(error):
                raise WeightsUnreachableError(f"{ref}: {error.cause}") from error
            self._lose_or_raise(ref, error)

    async def _hand_over(self, slot: Slot, sync_id: str, bucket: Bucket) -> None:
        parcel = await self._parcel_for(slot.node_id, bucket)
        await slot.actor.stage_weights.remote(sync_id, parcel)

    async def _hand_over_what_is_left(self, slot: Slot, sync_id: str, bucket: Bucket) -> None:
        """Of the weights in force, which nobody can send again."""
        try:
            await self._hand_over(slot, sync_id, bucket)
        except Exception as error:
            if not _is_unreachable(error):
                raise
            bucket.pop(slot.node_id)  # what held it has died
            await self._hand_over(slot, sync_id, bucket)

    async def _parcel_for(self, node_id: str, bucket: Bucket) -> WeightParcel:
        """One that the node can open."""
        if node_id not in bucket:
            bucket[node_id] = await self._export(bucket)
        return bucket[node_id]

    async def _export(self, bucket: Bucket) -> ObjectParcel:
        """For a node that had no engine when the bucket was sent: by the store of one that had, and lives."""
        for holder, parcel in bucket.items():
            if isinstance(parcel, SegmentParcel) and holder in self.stores:
                try:
                    [exported] = await self.stores[holder].export.remote([parcel])
                except RayError:
                    continue
                return exported
        anywhere = next((parcel for parcel in bucket.values() if isinstance(parcel, ObjectParcel)), None)
        if anywhere is None:
            raise WeightsUnreachableError("no node that had the weights in force is left: sync them again")
        return anywhere

    def _forget_dead_nodes(self) -> None:
        """Their stores answer no more, and what they made is lost."""
        alive = {node["NodeID"] for node in ray.nodes() if node["Alive"]}
        for node_id in self.stores.keys() - alive:
            del self.stores[node_id]

    async def _commit_at(self, ref: EngineRef, sync: _Sync, mode: SyncMode) -> CommitReport | None:
        try:
            report = await ref.actor.commit_weights.remote(sync.sync_id, sync.policy_version, mode)
        except Exception as error:  # whatever it is: the version is in force, so an engine without it must go
            self._fleet.lose(ref.engine_id, ref.incarnation, str(translate(str(ref), error)))
            return None
        self._keep(report.partials)
        return replace(report, partials={})

    def _lose_or_raise(self, ref: EngineRef, error: Exception) -> None:
        failure = translate(str(ref), error)
        if not is_loss(error):
            raise failure from error
        self._fleet.lose(ref.engine_id, ref.incarnation, str(failure))

    # --- whose turn it is ---

    def _check_version(self, policy_version: int, rollback: bool) -> None:
        if policy_version > self.policy_version or (rollback and policy_version != self.policy_version):
            return
        logger.warning("weight sync refused: its version is not new", extra={"policy_version": policy_version})
        raise ValueError(
            f"policy_version={policy_version} must be greater than the engines' {self.policy_version}: every sync "
            "needs a new version, or rollback=True to go back to an older one"
        )

    def _current(self, sync_id: str) -> _Sync:
        if self._sync is None or self._sync.sync_id != sync_id:
            raise EngineError(f"this weight sync paused for more than {LEASE_SECONDS:g} s and gave way to another one")
        self._sync.touched = time.monotonic()
        return self._sync

    def _is_abandoned(self, sync: _Sync) -> bool:
        return not sync.is_committing and time.monotonic() - sync.touched > LEASE_SECONDS

    def _discard(self, sync: _Sync) -> None:
        for slot in self._fleet.serving():
            slot.actor.discard_weights.remote(sync.sync_id)
        for store in self.stores.values():
            store.discard.remote(sync.sync_id)

    async def _clear(self, sync: _Sync) -> None:
        async with self._turn:
            if self._sync is sync:
                self._sync = None
            self._turn.notify_all()


def _tensors(parcels: Iterable[WeightParcel]) -> Iterator[tuple[str, torch.Tensor]]:
    import torch

    for parcel in parcels:
        for name, array in parcel.open().arrays.items():
            yield name, torch.from_numpy(array)


def _is_unreachable(error: Exception) -> bool:
    return isinstance(getattr(error, "cause", None), WeightsUnreachableError)


def _fields(sync: _Sync | None) -> dict[str, Any]:
    return {} if sync is None else {"sync_id": sync.sync_id, "policy_version": sync.policy_version}


def _log_commit(sync: _Sync, mode: SyncMode, num_bytes: int, reports: list[CommitReport]) -> None:
    what = {
        "mode": mode,
        "seconds": round(time.monotonic() - sync.began, 3),
        "bytes": num_bytes,
        "num_engines": len(reports),
        "pause_seconds": round(max((report.pause_seconds for report in reports), default=0.0), 4),
        "num_recomputed_tokens": sum(report.num_recomputed_tokens for report in reports),
    }
    logger.info("weight sync committed", extra=_fields(sync) | what)


def _life(ref: EngineRef) -> Life:
    return ref.engine_id, ref.incarnation
