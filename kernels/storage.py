"""Storage of weights and KV blocks: large tensors on huge pages, where the system grants them.

Blocks of a KV pool lie anywhere in gigabytes; on pages of 4 KiB, finding them takes as long as reading them.
"""

from __future__ import annotations

import ctypes
import functools
import math

import torch

HUGE_PAGE = 2 * 2**20
_MADV_HUGEPAGE = 14  # Linux; other systems have no such advice and go without


def empty_storage(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """An uninitialised, contiguous tensor on the CPU; a page that is never written costs no memory."""
    num_values = math.prod(shape)
    num_bytes = num_values * dtype.itemsize
    if num_bytes < HUGE_PAGE:
        return torch.empty(shape, dtype=dtype)
    room = torch.empty(num_values + HUGE_PAGE // dtype.itemsize, dtype=dtype)
    first = -room.data_ptr() % HUGE_PAGE // dtype.itemsize
    _advise(room.data_ptr() + first * dtype.itemsize, num_bytes)
    return room[first : first + num_values].view(shape)


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
