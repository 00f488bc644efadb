"""Elementary arithmetic inside kernels: matrix product, exponential, logarithm and random numbers.

`exp`, `log` and `uniform` are those of docs/numerics.md, "Elementary functions" and "Sampling". They keep that order
because kernels are compiled without implicit fusion (`kernels.gpu.launch`).
"""

from __future__ import annotations

import triton
import triton.language as tl

from kernels.gpu.launch import is_interpreted

INTERPRETED = tl.constexpr(is_interpreted())

EXP_LOWEST, EXP_HIGHEST = tl.constexpr(-87.33), tl.constexpr(89.0)
LOG2_E = tl.constexpr(1.44269504088896341)
ROUND_MAGIC = tl.constexpr(12582912.0)
LN2_HIGH, LN2_LOW = tl.constexpr(0.693359375), tl.constexpr(-2.12194440e-4)

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


@triton.jit
def product(a, b, sums):
    """sums + a @ b in float32: tensor cores for bfloat16, fused multiply-adds for float32."""
    if INTERPRETED:
        # Its product of bfloat16 is that of the bit patterns (triton-lang/triton#11584), and its product of float32 is
        # the machine's BLAS, whose order of summation may depend on a row's place: float64 rounds that away.
        a, b, sums = a.to(tl.float64), b.to(tl.float64), sums.to(tl.float64)
        return tl.dot(a, b, sums, out_dtype=tl.float64).to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """float32 x as dtype, to nearest, ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:  # it would cut the lower bits off
        bits = x.to(tl.uint32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def tile_product(
    x_rows, has_row, weight_rows, has_column,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x @ weight.T for rows of both given by pointers to their starts: one accumulator, k ascending."""
    sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for begin in range(0, K, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        has_x, has_weight = has_row[:, None], has_column[None, :]
        if K % BLOCK_K != 0:
            has_x, has_weight = has_x & (k < K)[None, :], has_weight & (k < K)[:, None]
        x = tl.load(x_rows[:, None] + k[None, :], mask=has_x, other=0.0)
        weight = tl.load(weight_rows[None, :] + k[:, None], mask=has_weight, other=0.0)
        sums = product(x, weight, sums)
    return sums


@triton.jit
def exp(x):
    """The exponential of float32, in the contract's steps; x up to 88."""
    y = tl.maximum(tl.minimum(x, EXP_HIGHEST), EXP_LOWEST)
    n = tl.fma(y, tl.full(y.shape, LOG2_E, tl.float32), ROUND_MAGIC) - ROUND_MAGIC
    r = tl.fma(n, tl.full(y.shape, -LN2_HIGH, tl.float32), y)
    r = tl.fma(n, tl.full(y.shape, -LN2_LOW, tl.float32), r)
    p = tl.fma(r, 1.9875691500e-4, 1.3981999507e-3)
    p = tl.fma(p, r, 8.3334519073e-3)
    p = tl.fma(p, r, 4.1665795894e-2)
    p = tl.fma(p, r, 1.6666665459e-1)
    p = tl.fma(p, r, 5.0000001201e-1)
    p = tl.fma(p, r * r, r) + 1.0
    power = ((n.to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < EXP_LOWEST, 0.0, p * power)


@triton.jit
def log(x):
    """The natural logarithm of finite float64 x >= 1, in the contract's steps."""
    bits = x.to(tl.int64, bitcast=True)
    k = (bits >> 52) - 1023
    m = ((bits & 0xFFFFFFFFFFFFF) | (1023 << 52)).to(tl.float64, bitcast=True)
    is_high = m > 1.4142135623730951
    m, k = tl.where(is_high, m * 0.5, m), tl.where(is_high, k + 1, k).to(tl.float64)
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    t2 = 1.818357216161805012e-01 + w * 1.479819860511658591e-01
    t2 = z * (6.666666666666735130e-01 + w * (2.857142874366239149e-01 + w * t2))
    half = (0.5 * f) * f
    rest = s * (half + (t2 + t1)) + k * 1.90821492927058770002e-10
    return k * 6.93147180369123816490e-01 - ((half - rest) - f)


@triton.jit
def uniform(seed, position, index):
    """u in [0, 1), float64 with 53 bits, of Philox4x32-10: key seed (int64), counter (position, index, 0, 0)."""
    mask: tl.constexpr = 0xFFFFFFFF
    key = seed.to(tl.uint64, bitcast=True)
    k0, k1 = key & mask, key >> 32
    c0, c1 = position.to(tl.uint64) & mask, index.to(tl.uint64) & mask
    c2, c3 = tl.zeros_like(c0), tl.zeros_like(c0)
    for _ in tl.static_range(10):
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (second >> 32) ^ c1 ^ k0, second & mask, (first >> 32) ^ c3 ^ k1, first & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return (((c0 << 32) | c1) >> 11).to(tl.float64) * 1.1102230246251565e-16
