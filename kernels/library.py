"""The loaded C library: its functions with their argument types, and the worker threads that run them."""

from __future__ import annotations

import contextlib
import ctypes
import functools
from collections.abc import Callable, Iterator
from contextvars import ContextVar

from kernels.build import best_instruction_set, library_path

_P, _I, _F = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "ls_linear": (None, [_P, _I, _P, _I, _P, _I, _P, _I, _I, _I, _I]),
    "ls_pack_rows": (None, [_P, _I, _P, _I, _I, _I]),
    "ls_unpack_rows": (None, [_P, _I, _P, _I, _I, _I]),
    "ls_embedding": (None, [_P, _I, _P, _P, _I, _I]),
    "ls_round_rows": (None, [_P, _I, _P, _I, _I, _I]),
    "ls_round_transposed": (None, [_P, _I, _P, _I, _I, _I]),
    "ls_pack_columns": (None, [_P, _I, _P, _I, _I]),
    "ls_rms_norm": (None, [_P, _I, _P, _P, _P, _P, _I, _P, _I, _I, _I, _F]),
    "ls_rms_norm_backward": (None, [_P, _I, _P, _P, _P, _I, _P, _P, _I, _P, _I, _I, _I]),
    "ls_rotary_table": (None, [_P, _P, _I, _I]),
    "ls_rotary": (None, [_P, _I, _P, _P, _P, _I, _I, _I, _F]),
    "ls_silu_and_mul": (None, [_P, _P, _I, _I]),
    "ls_silu_and_mul_backward": (None, [_P, _P, _P, _I, _I]),
    "ls_attention": (ctypes.c_int, [_P, _I, _P, _P, _I, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _I, _I, _F]),
    "ls_attention_backward": (
        ctypes.c_int,
        [_P, _I, _P, _I, _P, _I, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I, _I, _I, _F],
    ),
    "ls_kv_store": (None, [_P, _I, _P, _I, _P, _P, _I, _P, _P, _I, _I, _I, _I]),
    "ls_copy_blocks": (None, [_P, _P, _I, _I, _I]),
    "ls_vocab_stats": (None, [_P, _P, _I, _P, _P, _P, _I, _I, _I]),
    "ls_draw": (None, [_P, _P, _I, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _P, _I, _I, _I]),
    "ls_logit_gradient": (None, [_P, _P, _I, _P, _P, _P, _P, _P, _P, _P, _I, _P, _I, _I, _I, _I]),
    "ls_truncated_sample": (ctypes.c_int, [_P] * 20 + [_I, _I, _I]),
    "ls_replay": (_I, [_P, _I]),
    "ls_digest_pieces": (_I, [_I]),
    "ls_digest": (None, [_P, _P, _P, _P, _I]),
    "ls_set_num_threads": (ctypes.c_int, [ctypes.c_int]),
    "ls_get_num_threads": (ctypes.c_int, []),
}


_calls: ContextVar[list[tuple[str, tuple]] | None] = ContextVar("calls", default=None)


def library() -> ctypes.CDLL | _Recorder:
    """The C kernels of this process, built and loaded on first use. Calls into it release the GIL."""
    calls = _calls.get()
    return _loaded() if calls is None else _Recorder(_loaded(), calls)


@contextlib.contextmanager
def recording_calls() -> Iterator[list[tuple[str, tuple]]]:
    """Notes (name, arguments) of every kernel call that this thread makes meanwhile."""
    calls: list[tuple[str, tuple]] = []
    token = _calls.set(calls)
    try:
        yield calls
    finally:
        _calls.reset(token)


class _Recorder:
    """The library with every call noted."""

    def __init__(self, loaded: ctypes.CDLL, calls: list[tuple[str, tuple]]) -> None:
        self._loaded, self._calls = loaded, calls

    def __getattr__(self, name: str) -> Callable:
        function = getattr(self._loaded, name)

        def call(*arguments: int | float | None) -> int | None:
            self._calls.append((name, arguments))
            return function(*arguments)

        return call


@functools.cache
def _loaded() -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(library_path(best_instruction_set())))
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype, function.argtypes = result, arguments
    return loaded


def instruction_set() -> str:
    """Which build of the kernels this process runs: "avx512bf16", "avx512", "avx2" or "generic"."""
    return best_instruction_set()


def set_num_threads(num_threads: int) -> int:
    """Sets how many threads run the C kernels of this process, the caller's among them; returns the number in force.

    Results do not depend on it. Raises ValueError outside 1..256.
    """
    if not 1 <= num_threads <= 256:
        raise ValueError(f"num_threads={num_threads} must lie between 1 and 256")
    return library().ls_set_num_threads(num_threads)


def get_num_threads() -> int:
    """How many threads run the C kernels of this process."""
    return library().ls_get_num_threads()
