"""Weight sync: buckets checked, digested tensors at the sender and holds verified views of them at an engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

import numpy as np
import torch

import kernels
from engine.llm_engine import MAX_POLICY_VERSION
from engine.model import EMBEDDING, LM_HEAD, NamedTensors
from engine.outputs import UpdateMode
from kernels.checksum import combine_digests, digest_and_scan, tensor_digest
from rollout.weight_parcel import WeightBucket

SYNC_MODES = get_args(UpdateMode)
BUCKET_BYTES = 64 * 2**20  # small enough that engines verify one while the next is read

Room = Callable[[str, tuple[int, ...]], torch.Tensor]
"""Gives the memory that a weight of this name and shape is to be copied to, contiguous float32 on the CPU."""


def check_sync_options(policy_version: int, mode: str) -> None:
    """ValueError for a policy version that is no such number, or an unknown mode."""
    is_integer = isinstance(policy_version, int) and not isinstance(policy_version, bool)
    if not is_integer or not 0 <= policy_version <= MAX_POLICY_VERSION:
        raise ValueError(f"policy_version={policy_version!r} must be an integer from 0 to {MAX_POLICY_VERSION}")
    if mode not in SYNC_MODES:
        raise ValueError(f"mode={mode!r} must be one of {', '.join(map(repr, SYNC_MODES))}")


class WeightSender:
    """Turns named tensors into checked buckets and knows, once they are all read, what was sent.

    shapes: of every weight of the model, by Hugging Face name. bucket_bytes: a larger tensor is a bucket of its own.
    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], bucket_bytes: int = BUCKET_BYTES) -> None:
        self._shapes = shapes
        self._bucket_bytes = bucket_bytes
        self._digests: dict[str, bytes] = {}
        self.num_bytes = 0

    @property
    def checksum(self) -> bytes:
        """Of the weights sent, as an engine computes it over those it holds."""
        return combine_digests(self._digests)

    def buckets(self, named_tensors: NamedTensors, room: Room | None = None) -> Iterator[WeightBucket]:
        """Reads one bucket at a time. With `room` its arrays are copies there, made in the pass that digests them.

        Raises ValueError for a tensor that is unknown, given twice, misshapen, not floating point or not finite, as it
        is met, and for missing ones at the end. A tied model's `lm_head.weight` may come too; it is not sent.
        """
        # a process that computes has set its threads; one that only syncs would use a single one
        kernels.set_num_threads(max(kernels.get_num_threads(), torch.get_num_threads()))
        arrays: dict[str, np.ndarray] = {}
        num_bytes = 0
        for name, values in self._read(named_tensors, room):
            if arrays and num_bytes + values.nbytes > self._bucket_bytes:
                yield self._bucket(arrays)
                arrays, num_bytes = {}, 0
            arrays[name] = values.numpy()
            num_bytes += values.nbytes
        if arrays:
            yield self._bucket(arrays)

    def _bucket(self, arrays: dict[str, np.ndarray]) -> WeightBucket:
        return WeightBucket(arrays=arrays, digests={name: self._digests[name] for name in arrays})

    def _read(self, named_tensors: NamedTensors, room: Room | None) -> Iterator[tuple[str, torch.Tensor]]:
        """Names and checked float32 tensors; their digests are taken on the way."""
        tied_head: bytes | None = None
        for name, tensor in named_tensors.items() if isinstance(named_tensors, Mapping) else named_tensors:
            if self._is_tied_head(name):
                _, tied_head = _checked(name, tensor, self._shapes[EMBEDDING])
                continue
            self._check_name(name)
            target = room(name, self._shapes[name]) if room else None
            values, self._digests[name] = _checked(name, tensor, self._shapes[name], target)
            self.num_bytes += values.nbytes
            yield name, values
        self._check_complete()
        if tied_head not in (None, self._digests.get(EMBEDDING)):
            raise ValueError(f"this model's {LM_HEAD!r} is tied to {EMBEDDING!r}, but they differ: leave it out")

    def _is_tied_head(self, name: str) -> bool:
        return name == LM_HEAD and LM_HEAD not in self._shapes and EMBEDDING in self._shapes

    def _check_name(self, name: str) -> None:
        if name not in self._shapes:
            example = next(iter(self._shapes), None)
            raise ValueError(f"the model has no weight {name!r}: use its Hugging Face names, such as {example!r}")
        if name in self._digests:
            raise ValueError(f"weight {name!r} is given twice")

    def _check_complete(self) -> None:
        missing = [name for name in self._shapes if name not in self._digests]
        if missing:
            raise ValueError(f"{len(missing)} of {len(self._shapes)} weights are missing, such as {missing[0]!r}")


def _checked(
    name: str, tensor: torch.Tensor, shape: tuple[int, ...], target: torch.Tensor | None = None
) -> tuple[torch.Tensor, bytes]:
    """The tensor as contiguous float32 on the CPU, in `target` if there is one, and its digest."""
    if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
        kind = tensor.dtype if isinstance(tensor, torch.Tensor) else type(tensor).__name__
        raise ValueError(f"weight {name!r} must be a floating point tensor, got {kind}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"weight {name!r} has shape {tuple(tensor.shape)}, the model's is {tuple(shape)}")
    values = tensor.detach()
    if target is not None and not _is_plain(values):
        values = target.copy_(values)
    values = values.to(device="cpu", dtype=torch.float32).contiguous()
    digest, has_nonfinite = digest_and_scan(values, None if values is target else target)
    if has_nonfinite:
        raise ValueError(f"weight {name!r} holds NaN or infinity: the engines keep the weights they have")
    return values if target is None else target, digest


def _is_plain(values: torch.Tensor) -> bool:
    return values.dtype is torch.float32 and values.device.type == "cpu" and values.is_contiguous()


@dataclass(frozen=True, slots=True, kw_only=True)
class StagedWeights:
    """Verified views of the weights of one sync, with the digests they were verified by."""

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    digests: dict[str, bytes] = field(default_factory=dict)


class WeightStaging:
    """Weights that an engine holds views of but does not use yet, by sync."""

    def __init__(self) -> None:
        self._by_sync: dict[str, StagedWeights] = {}

    def add(self, sync_id: str, bucket: WeightBucket) -> None:
        """Keeps the bucket's tensors if they are what the sender read; RuntimeError otherwise."""
        staged = self._by_sync.setdefault(sync_id, StagedWeights())
        for name, array in bucket.arrays.items():
            tensor = torch.from_numpy(array)
            if tensor_digest(tensor) != bucket.digests[name]:
                raise RuntimeError(f"weight {name!r} arrived with other bits than were sent")
            staged.tensors[name], staged.digests[name] = tensor, bucket.digests[name]

    def take(self, sync_id: str) -> StagedWeights:
        """Everything staged under `sync_id`. Drops what other syncs left: they were begun before this one ended."""
        staged = self._by_sync[sync_id]
        self._by_sync.clear()
        return staged

    def discard(self, sync_id: str) -> None:
        """Lets the views go; nothing happens if there are none."""
        self._by_sync.pop(sync_id, None)
