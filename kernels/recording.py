"""Recording: the kernel calls of a forward pass, noted once and run again by one call, as a CUDA graph is on a GPU.

Python takes longer to make the four hundred calls of a decode step than some of them take. A recording runs them
without it: the same functions on the same addresses, so inputs are written in place and outputs are read where they
were.
"""

from __future__ import annotations

import ctypes
import struct
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kernels.library import library, recording_calls
from kernels.storage import empty_storage

RECORDABLE = (  # in the order of run_call in csrc/recording.c
    "ls_embedding",
    "ls_round_rows",
    "ls_linear",
    "ls_rms_norm",
    "ls_rotary",
    "ls_silu_and_mul",
    "ls_kv_store",
    "ls_attention",
)
MAX_ARGUMENTS = 20
MIN_ROOM_BYTES = 4096


class Recording:
    """What `record` noted: `run()` does it again and returns the same output tensor, overwritten."""

    def __init__(self, calls: Sequence[tuple[str, tuple]], output: torch.Tensor) -> None:
        self.calls, self.output = calls, output
        self._calls = (_Call * len(calls))(*(_as_call(name, arguments) for name, arguments in calls))

    def run(self) -> torch.Tensor:
        num_done = library().ls_replay(self._calls, len(self._calls))
        if num_done != len(self._calls):
            raise MemoryError(f"recorded kernel call {num_done} of {len(self._calls)} found no memory")
        return self.output

    def only(self, *names: str) -> Recording:
        """The calls of some kernels alone, to time them; what they compute means nothing."""
        return Recording([call for call in self.calls if call[0] in names], self.output)


class Arena:
    """Memory for what recorded operations compute. Recordings of one arena share it, so run one at a time."""

    def __init__(self) -> None:
        self._free: defaultdict[int, list[torch.Tensor]] = defaultdict(list)

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """An uninitialised tensor; when its storage is let go of, its memory serves the next one."""
        num_values = max(1, torch.Size(shape).numel())
        num_bytes = max(MIN_ROOM_BYTES, 1 << (num_values * dtype.itemsize - 1).bit_length())
        rooms = self._free[num_bytes]
        room = rooms.pop() if rooms else empty_storage(num_bytes, dtype=torch.uint8)
        buffer = _buffer_type(num_bytes).from_address(room.data_ptr())
        weakref.finalize(buffer, rooms.append, room)
        values = torch.frombuffer(buffer, dtype=dtype, count=num_values)  # its storage keeps the buffer
        return values[: torch.Size(shape).numel()].view(shape)


def record(forward: Callable[[], torch.Tensor], arena: Arena) -> Recording:
    """Runs `forward` once, under torch.inference_mode, and notes its kernel calls.

    The caller keeps every input of it alive and in place, as it keeps weights and KV blocks.

    Raises:
        RuntimeError: forward computes something by other means than the recordable kernels, which a recording would
            leave out.
    """
    with _Watch(arena), recording_calls() as calls:
        output = forward()
    unknown = sorted({name for name, _ in calls} - set(RECORDABLE))
    if unknown:
        raise RuntimeError(f"a recording cannot repeat {', '.join(unknown)}: only {', '.join(RECORDABLE)}")
    return Recording(calls, output)


class _Watch(TorchDispatchMode):
    """Takes new tensors from the arena; lets views through; refuses everything else."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its compiler, for seconds, to keep it out of the dispatch: nothing is compiled here
        return False

    def __init__(self, arena: Arena) -> None:
        super().__init__()
        self.arena = arena

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten.empty.memory_format:
            return self.arena.empty(args[0], kwargs.get("dtype") or torch.get_default_dtype())
        if function is torch.ops.aten.new_empty.default:
            return self.arena.empty(args[1], kwargs.get("dtype") or args[0].dtype)
        if function.is_view or function is torch.ops.aten.detach.default:
            result = function(*args, **kwargs)
            if _share_memory(args[0], result):  # `contiguous` and its like may be views, and may copy
                return result
        raise RuntimeError(f"a recording cannot repeat {function}: only kernel calls, new tensors and views")


def _share_memory(tensor: torch.Tensor, result: torch.Tensor | Sequence[torch.Tensor]) -> bool:
    parts = [result] if isinstance(result, torch.Tensor) else result
    address = tensor.untyped_storage().data_ptr()
    return all(part.untyped_storage().data_ptr() == address for part in parts)


class _Call(ctypes.Structure):
    _fields_ = (("op", ctypes.c_int64), ("arguments", ctypes.c_int64 * MAX_ARGUMENTS))


def _as_call(name: str, arguments: tuple) -> _Call:
    return _Call(RECORDABLE.index(name), tuple(_as_word(argument) for argument in arguments))


def _as_word(argument: int | float | None) -> int:
    if isinstance(argument, float):
        return struct.unpack("<i", struct.pack("<f", argument))[0]
    return argument or 0


def _buffer_type(num_bytes: int) -> type[ctypes.Array]:
    """A ctypes array whose instances can be watched: plain ones take no weak references."""
    if num_bytes not in _BUFFER_TYPES:
        _BUFFER_TYPES[num_bytes] = type("Buffer", (ctypes.c_char * num_bytes,), {})
    return _BUFFER_TYPES[num_bytes]


_BUFFER_TYPES: dict[int, type[ctypes.Array]] = {}
