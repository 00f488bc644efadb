"""WeightDelivery: carries the buckets of one sync to every node that has engines, by the fastest way there is."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import ray
from ray.exceptions import RayError, RayTaskError

from rollout.errors import EngineError, translate
from rollout.shared_segment import SegmentAddress, SegmentUnreachableError, map_segment
from rollout.weight_parcel import (
    ArrayPlace,
    ObjectParcel,
    SegmentParcel,
    WeightBucket,
    WeightParcel,
    WeightsUnreachableError,
    put_bucket,
    view_bucket,
)

if TYPE_CHECKING:
    import torch

WeightTransport = Literal["auto", "shared_memory", "broadcast", "object_store"]
TRANSPORTS = get_args(WeightTransport)
ALIGNMENT = 64  # bytes: of arrays in a segment
RELAY_SECONDS = 60.0  # what one transfer between nodes may take before it counts as failed

logger = logging.getLogger(__name__)


class WeightTransportError(EngineError):
    """The transport that was asked for broke; nothing was switched."""


def choose_transport(
    transport: WeightTransport, sender_node: str, engine_nodes: Sequence[str], store_nodes: Sequence[str]
) -> WeightTransport:
    """How a sync goes, by where things are; never "auto". Arguments but the first are node ids.

    Raises ValueError for a transport that is unknown or cannot reach these engines.
    """
    if transport not in TRANSPORTS:
        raise ValueError(f"weight_transport={transport!r} must be one of {', '.join(map(repr, TRANSPORTS))}")
    elsewhere = sorted(set(engine_nodes) - {sender_node})
    if transport == "auto":
        if not {sender_node, *engine_nodes} <= set(store_nodes):
            return "object_store"
        return "broadcast" if elsewhere else "shared_memory"
    if transport == "shared_memory" and elsewhere:
        raise ValueError(
            f"weight_transport='shared_memory' reaches the sender's node only, and engines run on {len(elsewhere)} "
            "others: use 'auto' or 'broadcast'"
        )
    without_store = {sender_node, *engine_nodes} - set(store_nodes)
    if transport != "object_store" and without_store:
        raise ValueError(
            f"weight_transport={transport!r} needs a weight store on node {min(without_store)[:8]}: use 'auto', or "
            "sync from a node that has engines"
        )
    return transport


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """What a delivery needs to know of the pool."""

    transport: WeightTransport
    engine_nodes: tuple[str, ...]  # node ids, of those that are to have the weights
    stores: Mapping[str, Any]  # WeightStore handles by node id
    relay_seconds: float = RELAY_SECONDS


class SegmentWriter:
    """Lays tensors one behind the other in a segment, and knows where each of them lies."""

    def __init__(self, address: SegmentAddress) -> None:
        self.address = address
        self._memory = map_segment(address, is_writable=True)
        self._end = 0
        self._places: dict[str, ArrayPlace] = {}

    def room(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
        """Uninitialised memory for a float32 tensor."""
        import torch  # a trainer has it; the coordinator, which imports this module too, starts sooner without

        place = self._places[name] = ArrayPlace(offset=self._end, shape=tuple(shape))
        self._end += aligned(place.num_bytes)
        return torch.from_numpy(view_bucket(self._memory, {name: place}, {}).arrays[name])

    def parcel(self, bucket: WeightBucket) -> SegmentParcel:
        """Stands for a bucket of tensors that were written here."""
        places = {name: self._places[name] for name in bucket.arrays}
        return SegmentParcel(address=self.address, places=places, digests=bucket.digests)

    def bucket(self, parcel: SegmentParcel) -> WeightBucket:
        """A parcel's bucket, also when the segment's holder has died."""
        return view_bucket(self._memory, parcel.places, parcel.digests)


class WeightDelivery:
    """One sync's way to the engines' nodes. As a context manager it takes back what was sent if the sync fails.

    With transport "auto" a means that fails is replaced by Ray's object store, with a warning; one that was named
    raises WeightTransportError. After a switch, whoever keeps the parcels calls `keep_weights`.
    """

    def __init__(self, route: Route, sync_id: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self._route, self._sync_id = route, sync_id
        self._node_id = ray.get_runtime_context().get_node_id()
        self.transport = choose_transport(route.transport, self._node_id, route.engine_nodes, list(route.stores))
        self._num_bytes = sum(aligned(4 * int(np.prod(shape, dtype=np.int64))) for shape in shapes.values())
        self._writer: SegmentWriter | None = None
        self._relayed: dict[str, SegmentAddress] = {}  # segments of the nodes that a broadcast reaches

    def __enter__(self) -> WeightDelivery:
        if self.transport != "object_store":
            self._try(self._open_segment, f"the weight store of this node ({self._node_id[:8]})")
        if self._writer and self.transport == "broadcast":
            self._try(self._open_relay, "the relay between nodes")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is not None:
            for store in self._route.stores.values():
                store.discard.remote(self._sync_id)

    @property
    def room(self) -> Callable[[str, tuple[int, ...]], torch.Tensor] | None:
        """Where a sender is to copy tensors to, for `WeightSender.buckets`; None where they may stay."""
        return self._writer.room if self._writer else None

    def send(self, bucket: WeightBucket) -> dict[str, WeightParcel]:
        """The bucket's parcels by node id, one for each node with engines. Raises WeightTransportError."""
        local = self._writer.parcel(bucket) if self._writer else None
        if self._relayed:
            self._try(lambda: self._broadcast(*local.byte_range), "the relay between nodes")
        parcels: dict[str, WeightParcel] = {
            node_id: SegmentParcel(address=address, places=local.places, digests=local.digests)
            for node_id, address in self._relayed.items()
        }
        if local:
            parcels[self._node_id] = local
        missing = set(self._route.engine_nodes) - parcels.keys()
        return parcels | dict.fromkeys(missing, put_bucket(bucket)) if missing else parcels

    def send_again(self, parcels: Mapping[str, WeightParcel], reason: str) -> ObjectParcel:
        """The bucket of these parcels by the object store, for an engine that could not open its own.

        Raises WeightTransportError where the transport was named, or nothing of the bucket is left here.
        """
        local = parcels.get(self._node_id)
        if self._route.transport != "auto" or not isinstance(local, SegmentParcel):
            raise WeightTransportError(f"weight_transport={self.transport!r}: {reason}")
        logger.warning("weights go through Ray's object store: %s", reason)
        return put_bucket(self._writer.bucket(local))

    def _open_segment(self) -> None:
        begin = self._route.stores[self._node_id].begin.remote(self._sync_id, self._num_bytes)
        self._writer = SegmentWriter(ray.get(begin))

    def _open_relay(self) -> None:
        others = {node_id: self._route.stores[node_id] for node_id in set(self._route.engine_nodes) - {self._node_id}}
        begun = {node_id: store.begin.remote(self._sync_id, self._num_bytes) for node_id, store in others.items()}
        addresses = dict(zip(begun, ray.get(list(begun.values())), strict=True))
        ray.get(self._route.stores[self._node_id].lead_group.remote(others, self._route.relay_seconds))
        self._relayed = addresses

    def _broadcast(self, begin: int, end: int) -> None:
        root = self._route.stores[self._node_id]
        try:
            ray.get(root.broadcast.remote(self._sync_id, begin, end, self._route.relay_seconds))
        except RayError:
            self._relayed = {}  # the rest of this sync goes another way
            raise

    def _try(self, step: Callable[[], None], what: str) -> None:
        """Runs a step; with "auto" its failure is a warning, and the object store takes its place."""
        try:
            step()
        except (RayError, SegmentUnreachableError) as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            reason = f"{what} failed: {type(cause).__name__}: {cause}"
            if self._route.transport != "auto":
                raise WeightTransportError(f"weight_transport={self.transport!r}: {reason}") from error
            logger.warning("weights go through Ray's object store: %s", reason)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sent:
    parcels: Mapping[str, WeightParcel]  # one bucket's, by node id
    staged: list[ray.ObjectRef]  # acknowledgements, by receiver


def deliver(
    delivery: WeightDelivery,
    buckets: Iterator[WeightBucket],
    nodes: Sequence[str],
    stage: Callable[[int, int, WeightParcel], ray.ObjectRef],
) -> dict[str, list[WeightParcel]]:
    """First phase of a sync: all buckets are held and verified at every receiver. Parcels by node id.

    nodes: where the receivers are, each an engine or all engines of a node. stage(bucket number, receiver, parcel)
    hands a parcel over and returns the acknowledgement to come: one bucket is verified while the next is read. Raises
    what `buckets` raises, EngineError, or its subclass WeightTransportError.
    """
    sent: list[_Sent] = []
    for number, bucket in enumerate(buckets):
        parcels = delivery.send(bucket)
        sent.append(_Sent(parcels=parcels, staged=[stage(number, i, parcels[node]) for i, node in enumerate(nodes)]))
    for number, one in enumerate(sent):
        for i, acknowledgement in enumerate(one.staged):
            try:
                _acknowledge(acknowledgement)
            except WeightsUnreachableError as error:
                again = delivery.send_again(one.parcels, f"receiver {i} (node {nodes[i][:8]}): {error}")
                _acknowledge(stage(number, i, again))
    return {node_id: [one.parcels[node_id] for one in sent] for node_id in dict.fromkeys(nodes)}


def _acknowledge(acknowledgement: ray.ObjectRef) -> None:
    try:
        ray.get(acknowledgement)
    except RayTaskError as error:
        if isinstance(error.cause, WeightsUnreachableError):
            raise WeightsUnreachableError(str(error.cause)) from error
        raise translate("a receiver of weights", error) from error
    except RayError as error:
        raise translate("a receiver of weights", error) from error


def keep_weights(stores: Mapping[str, Any], sync_id: str) -> list[ray.ObjectRef]:
    """The sync's weights are the engines' now: its segments stay readable, and the last version's may be written again.

    To be called once engines have switched, by the actor that made them switch, since the sender may have died. The
    answers are to be waited for; those of stores that died do not matter.
    """
    return [store.keep.remote(sync_id) for store in stores.values()]


def aligned(num_bytes: int) -> int:
    return -(-num_bytes // ALIGNMENT) * ALIGNMENT
