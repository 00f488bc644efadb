"""Storage of weights and KV blocks: large tensors on huge pages, where the system grants them.

Blocks of a KV pool lie anywhere in gigabytes; on pages of 4 KiB, finding them takes as long as reading them.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

PANEL = 64  # rows of a weight that are packed side by side
HUGE_PAGE = 2 * 2**20
SHARED_BYTES = 16 * HUGE_PAGE
CACHE_LINE = 64
_MADV_HUGEPAGE = 14  # Linux; other systems have no such advice and go without


def empty_storage(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An uninitialised, contiguous tensor on the CPU; a page that is never written costs no memory."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    room = torch.empty(num_bytes + HUGE_PAGE, dtype=torch.uint8)
    first = -room.data_ptr() % HUGE_PAGE
    _advise(room.data_ptr() + first, num_bytes)
    return room[first : first + num_bytes].view(dtype).view(shape)


class HugePages:
    """Room for many tensors that are read together, on huge pages shared among them: the weights of a model.

    Every tensor keeps the memory that it shares alive.
    """

    def __init__(self) -> None:
        self._room = torch.empty(0, dtype=torch.uint8)

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """An uninitialised, contiguous tensor."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if num_bytes > len(self._room):
            self._room = empty_storage(max(num_bytes, SHARED_BYTES), dtype=torch.uint8)
        taken, self._room = self._room[:num_bytes], self._room[-(-num_bytes // CACHE_LINE) * CACHE_LINE :]
        return taken.view(dtype).view(shape)


def _advise(address: int, num_bytes: int) -> None:
    """Asks for huge pages; it is advice, and a system that refuses it changes nothing but speed."""
    madvise = _madvise()
    if madvise is not None:
        madvise(address, num_bytes // HUGE_PAGE * HUGE_PAGE, _MADV_HUGEPAGE)


@functools.cache
def _madvise() -> ctypes._FuncPointer | None:
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
