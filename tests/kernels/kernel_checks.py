"""Operands and comparisons that the kernel tests share."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.linear import pack_rows, packed_shape

WORD = {torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}


def spread(*shape: int, seed: int, low: int = -6, high: int = 7) -> torch.Tensor:
    """Random float32 whose exponents differ by up to 2^(high - low), so that the order of a sum shows in its bits."""
    generator = torch.Generator().manual_seed(seed)
    exponents = torch.randint(low, high, shape, generator=generator)
    return torch.ldexp(torch.randn(shape, generator=generator), exponents)


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bit patterns of a tensor: unlike values, they tell -0 from +0, and NaN equals itself."""
    return x.contiguous().view(WORD.get(x.dtype, x.dtype))


def num_different(a: torch.Tensor, b: torch.Tensor) -> int:
    """In how many elements two tensors of one shape and type differ in bits."""
    assert a.shape == b.shape, (a.shape, b.shape)
    assert a.dtype == b.dtype, (a.dtype, b.dtype)
    return int((bits(a) != bits(b)).sum())


def assert_same_bits(a: torch.Tensor, b: torch.Tensor) -> None:
    """Fails unless two tensors have the same shape, type and bits."""
    different = num_different(a, b)
    assert different == 0, f"{different} of {a.numel()} elements differ in bits"


def assert_rows_do_not_depend_on_their_number(
    run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, expected: torch.Tensor
) -> None:
    """Fails unless run(x[:M]) has the bits of expected[:M] for every M."""
    for num_rows in range(1, x.shape[0] + 1):
        different = num_different(run(x[:num_rows]), expected[:num_rows])
        assert different == 0, f"M={num_rows}: {different} elements differ in bits"


def pack(weight: torch.Tensor, tail: float = float("nan")) -> torch.Tensor:
    """Packed storage of a weight [N, K]; the columns beyond N hold `tail`."""
    packed = torch.full(packed_shape(*weight.shape), tail)
    pack_rows(packed, weight)
    return packed


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Fails unless float32 `actual` is within `tolerance` times the largest magnitude of float64 `exact`."""
    error = (actual.double() - exact).abs().max().item() / exact.abs().max().item()
    assert error < tolerance, f"relative error {error:.3g}"
