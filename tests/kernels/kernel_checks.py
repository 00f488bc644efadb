"""Operands and comparisons that the kernel tests share."""

from __future__ import annotations

import dataclasses
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
    """Packed storage of a weight [N, K], of its type; the columns beyond N hold `tail`."""
    packed = torch.full(packed_shape(*weight.shape, weight.dtype), tail, dtype=weight.dtype)
    pack_rows(packed, weight.float())
    return packed


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    """Fails unless float32 `actual` is within `tolerance` times the largest magnitude of float64 `exact`."""
    error = (actual.double() - exact).abs().max().item() / exact.abs().max().item()
    assert error < tolerance, f"relative error {error:.3g}"


# Attention


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequence:
    q: torch.Tensor  # [J, N, H]
    k: torch.Tensor  # [J, K, H]
    v: torch.Tensor  # [J, K, H]


def make_sequence(length: int, num_heads: int, num_kv_heads: int, head_dim: int, *, seed: int) -> Sequence:
    """Scores of a few units either way, so that neither one key nor all keys alike make up the result."""
    q = spread(length, num_heads, head_dim, seed=seed, low=-2, high=2)
    k = spread(length, num_kv_heads, head_dim, seed=seed + 1, low=-2, high=2)
    return Sequence(q=q, k=k, v=spread(length, num_kv_heads, head_dim, seed=seed + 2))


# two groups of a shared prompt and samples, a lone sequence, a prompt whose only sample is empty
SEGMENTS = [
    (0, 37, -1),
    (37, 50, 0),
    (50, 51, 0),
    (51, 90, 0),
    (90, 122, -1),
    (122, 130, 4),
    (130, 150, -1),
    (150, 160, -1),
    (160, 160, 7),
]


def packed_rows(num_heads: int = 4, num_kv_heads: int = 2, head_dim: int = 16, *, seed: int = 40) -> Sequence:
    """Queries, keys and values for the rows of SEGMENTS."""
    return make_sequence(160, num_heads, num_kv_heads, head_dim, seed=seed)
