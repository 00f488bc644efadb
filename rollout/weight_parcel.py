"""WeightParcel: a small, picklable stand-in for a bucket of weights, which the node that it is for can open."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import ray
from ray.exceptions import ObjectLostError, RayTaskError

from rollout.shared_segment import SegmentAddress, SegmentUnreachableError, map_segment


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightBucket:
    """Some of the weights. In Ray's object store the arrays are shared memory, which an engine reads without a copy."""

    arrays: dict[str, np.ndarray]  # by Hugging Face name: float32, C-contiguous
    digests: dict[str, bytes]  # by the same names, taken by the sender


class WeightsUnreachableError(RuntimeError):
    """A parcel cannot be opened here: what holds its bytes is gone or out of reach. It may be sent by other means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayPlace:
    """Where a float32 array lies in a segment."""

    offset: int  # in bytes
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return 4 * int(np.prod(self.shape, dtype=np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentParcel:
    """A bucket in a shared segment of the node. It can be opened until the second sync after its own begins."""

    address: SegmentAddress
    places: Mapping[str, ArrayPlace]  # by Hugging Face name
    digests: Mapping[str, bytes]  # by the same names, taken by the sender

    def open(self) -> WeightBucket:
        """The bucket, whose arrays are read-only views of the segment. Raises WeightsUnreachableError."""
        try:
            memory = map_segment(self.address)
        except SegmentUnreachableError as error:
            raise WeightsUnreachableError(str(error)) from error
        return view_bucket(memory, self.places, self.digests)

    @property
    def byte_range(self) -> tuple[int, int]:
        """(first byte, end) of the segment that the bucket takes."""
        places = self.places.values()
        return min(p.offset for p in places), max(p.offset + p.num_bytes for p in places)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectParcel:
    """A bucket in Ray's object store, from which any node can fetch it.

    It is lost with the process that put it there: a parcel that is to outlive a sender goes through
    `WeightStore.export`, at the price of a copy.
    """

    bucket: ray.ObjectRef

    def open(self) -> WeightBucket:
        """The bucket, whose arrays are read-only views of the node's object store. Raises WeightsUnreachableError."""
        try:
            return ray.get(self.bucket)
        except RayTaskError:
            raise
        except ObjectLostError as error:
            raise WeightsUnreachableError(f"weights in Ray's object store are lost: {error}") from error


WeightParcel = SegmentParcel | ObjectParcel


def view_bucket(memory: np.ndarray, places: Mapping[str, ArrayPlace], digests: Mapping[str, bytes]) -> WeightBucket:
    """The bucket whose arrays lie at these places of `memory` (bytes); nothing is copied."""
    arrays = {
        name: memory[place.offset : place.offset + place.num_bytes].view(np.float32).reshape(place.shape)
        for name, place in places.items()
    }
    return WeightBucket(arrays=arrays, digests=dict(digests))


def put_bucket(bucket: WeightBucket) -> ObjectParcel:
    """Copies a bucket into Ray's object store."""
    return ObjectParcel(bucket=ray.put(bucket))
