"""The one way a kernel is started: with no fused arithmetic that the source does not spell out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import triton

ALIGNMENT = 16  # bytes; Triton compiles another kernel for pointers that are less aligned
_recorded: list[Launch] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """A kernel with what it was given; `kernels.gpu.ahead_of_time` compiles it without a device."""

    kernel: Any
    arguments: tuple[Any, ...]  # tensors, numbers and None, in the order of the kernel's first parameters
    constants: dict[str, Any]  # its tl.constexpr parameters
    num_warps: int
    num_stages: int


def launch(
    kernel: Any, grid: tuple[int, ...], *arguments: Any, num_warps: int, num_stages: int = 1, **constants: Any
) -> None:
    """Runs kernel[grid] on the device of its first tensor. A product and a sum fuse only where it says `tl.fma`."""
    if _recorded is not None:
        _recorded.append(
            Launch(kernel=kernel, arguments=arguments, constants=constants, num_warps=num_warps, num_stages=num_stages)
        )
        return
    if 0 in grid:
        return
    with _device_of(arguments):
        kernel[grid](*arguments, **constants, num_warps=num_warps, num_stages=num_stages, enable_fp_fusion=False)


@contextmanager
def recorded_launches() -> Iterator[list[Launch]]:
    """Collects the launches inside instead of running them; ops then return what is uninitialised."""
    global _recorded
    assert _recorded is None, "launches are being recorded already"
    _recorded = []
    try:
        yield _recorded
    finally:
        _recorded = None


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x itself if contiguous at an aligned address, else a copy: where a tensor lies must not choose the kernel."""
    x = x.contiguous()
    return x if x.device.type == "meta" or x.data_ptr() % ALIGNMENT == 0 else x.clone()


def aligned_rows(x_TNH: torch.Tensor) -> torch.Tensor:
    """As `aligned`, but rows may lie apart, as the heads of q, k and v do in their common product."""
    _, num_heads, head_dim = x_TNH.shape
    heads_adjoin = x_TNH.stride(2) == 1 and (x_TNH.stride(1) == head_dim or num_heads == 1)
    rows_align = x_TNH.stride(0) % ALIGNMENT == 0 and x_TNH.stride(0) >= num_heads * head_dim
    is_aligned = x_TNH.device.type == "meta" or x_TNH.data_ptr() % ALIGNMENT == 0
    return x_TNH if heads_adjoin and rows_align and is_aligned else x_TNH.clone(memory_format=torch.contiguous_format)


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels of this process (TRITON_INTERPRET=1 before they were imported)."""
    return bool(triton.knobs.runtime.interpret)


def _device_of(arguments: tuple[Any, ...]) -> torch.cuda.device_of:
    return torch.cuda.device_of(next(x for x in arguments if isinstance(x, torch.Tensor)))
