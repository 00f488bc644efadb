"""Digests of weights: the same bytes give the same digest on both sides of a sync, at memory speed."""

from __future__ import annotations

import hashlib

import torch

from kernels.library import library


def digest_and_scan(tensor: torch.Tensor, copy_to: torch.Tensor | None = None) -> tuple[bytes, bool]:
    """(16-byte digest, whether any element is NaN or infinite) of a contiguous float32 tensor's elements and shape.

    copy_to: a tensor of the same kind and shape that takes the elements in the same pass over them.
    """
    _check(tensor)
    if copy_to is not None:
        _check(copy_to)
        if copy_to.shape != tensor.shape:
            raise ValueError(f"copy_to has shape {tuple(copy_to.shape)}, the tensor {tuple(tensor.shape)}")
    num_pieces = library().ls_digest_pieces(tensor.numel())
    pieces = tensor.new_empty(num_pieces, 8, dtype=torch.int64)
    flags = tensor.new_empty(num_pieces, dtype=torch.uint8)
    target = None if copy_to is None else copy_to.data_ptr()
    library().ls_digest(tensor.data_ptr(), target, pieces.data_ptr(), flags.data_ptr(), tensor.numel())
    digest = hashlib.blake2b(repr(tuple(tensor.shape)).encode() + pieces.numpy().tobytes(), digest_size=16)
    return digest.digest(), bool(flags.any())


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """The 16-byte digest of a contiguous float32 tensor."""
    return digest_and_scan(tensor)[0]


def combine_digests(digests: dict[str, bytes]) -> bytes:
    """One 16-byte checksum of named digests, whatever the order they came in."""
    combined = hashlib.blake2b(digest_size=16)
    for name in sorted(digests):
        combined.update(name.encode() + b"\0" + digests[name])
    return combined.digest()


def _check(tensor: torch.Tensor) -> None:
    if tensor.dtype is not torch.float32 or not tensor.is_contiguous() or tensor.device.type != "cpu":
        found = f"{tensor.dtype} on {tensor.device} with strides {tensor.stride()}"
        raise ValueError(f"digests are of contiguous float32 tensors on the CPU, not {found}")
