"""WeightStore: a small Ray actor for each node, which holds its shared segments of weights and relays their bytes."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rollout import cluster, logs
from rollout.shared_segment import SegmentAddress, close_segment, create_segment, map_segment

if TYPE_CHECKING:
    from rollout.weight_parcel import ObjectParcel, WeightParcel
    from rollout.weight_relay import RelayGroup


NOTICE_SECONDS = 2.0  # a peer's socket closes a little before Ray knows that the process died


class SegmentGenerations:
    """The segments of a node: the current version's, and those that are written for versions to come.

    Two alternate, sync after sync. A sync that fails has touched its own segment only.
    """

    def __init__(self, node_id: str) -> None:
        self._node_id = node_id
        self._current: tuple[str, SegmentAddress] | None = None
        self._written: dict[str, SegmentAddress] = {}  # by sync
        self._spare: SegmentAddress | None = None

    @property
    def num_bytes(self) -> int:
        """Of all segments together."""
        current = [self._current[1]] if self._current else []
        spare = [self._spare] if self._spare else []
        return sum(address.num_bytes for address in [*current, *self._written.values(), *spare])

    def begin(self, sync_id: str, num_bytes: int) -> SegmentAddress:
        """A segment for a sync to write. Raises MemoryError."""
        if self._spare is not None and self._spare.num_bytes < num_bytes:
            self._free(self._spare)
        if self._spare is None:
            self._spare = create_segment(self._node_id, num_bytes)
        self._written[sync_id], self._spare = self._spare, None
        return self._written[sync_id]

    def find(self, sync_id: str) -> SegmentAddress:
        """The segment that a sync writes."""
        return self._written[sync_id]

    def keep(self, sync_id: str) -> bool:
        """The sync's weights are the current ones now. Returns whether they are here.

        What other syncs write is let go of but not used again: nobody knows whether they still do.
        """
        if sync_id not in self._written:
            return self._current is not None and self._current[0] == sync_id
        last, self._current = self._current, (sync_id, self._written.pop(sync_id))
        if last is not None:
            self._reuse(last[1])
        while self._written:
            close_segment(self._written.popitem()[1])
        return True

    def discard(self, sync_id: str) -> None:
        """By the sender, who writes no more: the sync has failed. Nothing happens if it is unknown."""
        if sync_id in self._written:
            self._reuse(self._written.pop(sync_id))

    def _reuse(self, address: SegmentAddress) -> None:
        if self._spare is None:
            self._spare = address
        else:
            close_segment(address)

    def _free(self, address: SegmentAddress) -> None:
        self._spare = None
        close_segment(address)


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreInfo:
    """What a weight store says of itself."""

    pid: int
    node_id: str
    num_bytes: int  # of its segments


@ray.remote(num_cpus=0, max_restarts=-1, max_concurrency=1, concurrency_groups={"relay": 1})
class WeightStore:
    """One for each node. Ray restarts it where it dies; the segments it held are lost to whoever has not mapped them.

    Relaying has a thread of its own, so that a transfer that hangs holds up nothing else.
    """

    def __init__(self, pool: str = "pool") -> None:
        logs.configure(pool=pool, actor="weight-store")
        self._node_id = ray.get_runtime_context().get_node_id()
        self._segments = SegmentGenerations(self._node_id)
        self._group: RelayGroup | None = None
        self._members: Mapping[str, Any] = {}  # the other nodes' stores, where this one is the root of a group

    def info(self) -> StoreInfo:
        return StoreInfo(pid=os.getpid(), node_id=self._node_id, num_bytes=self._segments.num_bytes)

    def begin(self, sync_id: str, num_bytes: int) -> SegmentAddress:
        return self._segments.begin(sync_id, num_bytes)

    def keep(self, sync_id: str) -> bool:
        return self._segments.keep(sync_id)

    def discard(self, sync_id: str) -> None:
        self._segments.discard(sync_id)

    def export(self, parcels: Sequence[WeightParcel]) -> list[ObjectParcel]:
        """The same buckets in Ray's object store, owned by this process: for a node that came too late to get them
        otherwise, or to outlive their sender. Raises WeightsUnreachableError."""
        from rollout.weight_parcel import put_bucket

        return [put_bucket(parcel.open()) for parcel in parcels]

    @ray.method(concurrency_group="relay")
    def lead_group(self, members: Mapping[str, Any], timeout: float) -> None:
        """Makes this store the root of a group with the stores of other nodes, unless it is so already.

        Raises RelayError.
        """
        from rollout.weight_relay import ROOT, RelayGroup, node_ip, open_rendezvous

        if self._group is not None and self._members.keys() == members.keys():
            return
        self._group, self._members = None, members
        size = len(members) + 1
        meeting = open_rendezvous(size, timeout)
        joined = {
            node_id: store.join_group.remote(node_ip(), meeting.port, rank, size, timeout)
            for rank, (node_id, store) in enumerate(sorted(members.items()), start=ROOT + 1)
        }
        try:
            self._group = RelayGroup(meeting, ROOT, size, timeout)
            _wait_for_members(joined, timeout)
        except Exception:
            self._group = None
            _raise_known_failure(joined)
            raise

    @ray.method(concurrency_group="relay")
    def join_group(self, host: str, port: int, rank: int, size: int, timeout: float) -> None:
        from rollout.weight_relay import RelayGroup, join_rendezvous

        self._group, self._members = None, {}
        self._group = RelayGroup(join_rendezvous(host, port, size, timeout), rank, size, timeout)

    @ray.method(concurrency_group="relay")
    def broadcast(self, sync_id: str, begin: int, end: int, timeout: float) -> None:
        """At the root: bytes of its segment to the same place of all members'. Raises RelayError, after which the
        group is gone: the next `lead_group` makes a new one."""
        arrivals = {node_id: store.receive.remote(sync_id, begin, end) for node_id, store in self._members.items()}
        try:
            self._transfer(sync_id, begin, end)
            _wait_for_members(arrivals, timeout)
        except Exception:
            self._group = None
            _raise_known_failure(arrivals)
            raise

    @ray.method(concurrency_group="relay")
    def receive(self, sync_id: str, begin: int, end: int) -> None:
        self._transfer(sync_id, begin, end)

    def _transfer(self, sync_id: str, begin: int, end: int) -> None:
        from rollout.weight_relay import NoGroupError

        if self._group is None:
            raise NoGroupError("it was restarted in mid-transfer, or its last transfer failed")
        try:
            self._group.broadcast(map_segment(self._segments.find(sync_id), True)[begin:end])
        except Exception:
            self._group = None
            raise


def start_weight_stores(node_ids: Sequence[str], pool: str = "pool") -> dict[str, Any]:
    """A store on each of these nodes, by node id; they end with the process that starts them."""
    return {
        node_id: WeightStore.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
            runtime_env=cluster.helper_env(),
        ).remote(pool)
        for node_id in dict.fromkeys(node_ids)
    }


def _wait_for_members(answers: Mapping[str, ray.ObjectRef], timeout: float) -> None:
    """Until every member has answered; RelayError names the first that did not."""
    for node_id, answer in answers.items():
        try:
            ray.get(answer, timeout=timeout)
        except RayError as error:
            raise _relay_error(node_id, error) from error


def _raise_known_failure(answers: Mapping[str, ray.ObjectRef]) -> None:
    """RelayError for a member that is known to have died, which says more than what the others noticed of it."""
    from rollout.weight_relay import NoGroupError

    ray.wait(list(answers.values()), num_returns=len(answers), timeout=NOTICE_SECONDS)
    for node_id, answer in answers.items():
        try:
            ray.get(answer, timeout=0)
        except RayActorError as error:
            raise _relay_error(node_id, error) from error
        except RayTaskError as error:
            if isinstance(error.cause, NoGroupError):
                raise _relay_error(node_id, error) from error
        except RayError:
            pass  # it waits yet, or noticed what this process did


def _relay_error(node_id: str, error: RayError) -> Exception:
    from rollout.weight_relay import RelayError

    who = f"the weight store of node {node_id[:8]}"
    if isinstance(error, RayTaskError):
        return RelayError(f"{who} failed: {error.cause}")
    if isinstance(error, RayActorError):
        return RelayError(f"{who} died in mid-transfer")
    return RelayError(f"{who} did not answer in time")
