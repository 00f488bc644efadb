"""What every kernel of the CPU profiles computes, in slow and plain arithmetic: the C kernels equal it bit for bit.

This is docs/numerics.md in code. Numpy only spreads a chain of operations over many independent elements; nothing here
sums over an axis by itself. Names and arguments are those of the fast kernels, except that weights are not packed: a
weight is a float32 or a bfloat16 tensor [N, K].
"""

from __future__ import annotations

import decimal
import hashlib
import itertools
import math

import numpy as np
import torch

from kernels.attention import PackedPlan
from kernels.rope_scaling import RopeScaling

K_BLOCK = 128  # linear: length of one FMA chain over k
MAX_SEGMENTS = 8  # linear: leaves of the tree over K
KEY_CHUNK = 256  # attention: keys between two merges, counted from position 0
VOCAB_BLOCK = 64  # log-sum-exp: entries under one maximum
DIGEST_PIECE, DIGEST_PRIME = 1 << 18, 0x9E3779B97F4A7C15

SMALLEST_NORMAL = np.float32(2.0**-126)
EXP_LOWEST = np.float32(-87.33)
EXP_HIGHEST = np.float32(89.0)
LOG2_E = np.float32(1.44269504088896341)
ROUND_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23: adding it rounds to the nearest integer, ties to even
LN2_HIGH, LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
EXP_POLYNOMIAL = tuple(
    np.float32(c)
    for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1)
)

Array = np.ndarray


# Elementary operations


def fma(a: Array, b: Array, c: Array) -> Array:
    """float32(a * b + c), rounded once.

    The product of two float32 is exact in float64. The sum is rounded to odd (an inexact result takes the neighbour
    whose last bit is 1), after which rounding to float32 cannot be a second rounding (Boldo and Melquiond, 2008).
    """
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.float64(a) * np.float64(b)
        addend = np.float64(c)
        total = np.asarray(product + addend)
        virtual = total - product
        error = (product - (total - virtual)) + (addend - virtual)  # exact (Knuth's two-sum)
        bits = total.view(np.int64)
        is_off = (error != 0) & ((bits & 1) == 0) & np.isfinite(total)
        away_from_zero = (error > 0) == (total > 0)
        odd = np.where(is_off, np.where(away_from_zero, bits + 1, bits - 1), bits)
        return odd.view(np.float64).astype(np.float32)


def flushed_fma(a: Array, b: Array, c: Array) -> Array:
    """As the bfloat16 dot product does it: subnormal operands are zeros; so is a result below 2^-126 in magnitude, its
    rounding not yet limited by the range of exponents. Signs stay."""
    a, b, c = (np.where(np.abs(x) < SMALLEST_NORMAL, np.copysign(np.float32(0), x), x) for x in (a, b, c))
    unbounded = fma(np.float64(a) * 2.0**50, b, np.float64(c) * 2.0**50)
    return np.where(
        np.abs(unbounded) < SMALLEST_NORMAL * np.float32(2.0**50), np.copysign(np.float32(0), unbounded), fma(a, b, c)
    )


def sum16(lanes: Array) -> Array:
    """T16 over the last axis, of length 16."""
    for width in (8, 4, 2, 1):
        lanes = lanes[..., :width] + lanes[..., width : 2 * width]
    return lanes[..., 0]


def exp(x: Array) -> Array:
    """The exponential of float32; +0 below EXP_LOWEST."""
    with np.errstate(over="ignore", invalid="ignore"):
        y = np.where(x < EXP_HIGHEST, x, EXP_HIGHEST)
        y = np.where(y > EXP_LOWEST, y, EXP_LOWEST)
        n = fma(y, LOG2_E, ROUND_MAGIC) - ROUND_MAGIC
        r = fma(n, -LN2_HIGH, y)
        r = fma(n, -LN2_LOW, r)
        p = np.full_like(r, EXP_POLYNOMIAL[0])
        for coefficient in EXP_POLYNOMIAL[1:]:
            p = fma(p, r, coefficient)
        p = fma(p, r * r, r) + np.float32(1.0)
        return np.where(x < EXP_LOWEST, np.float32(0.0), np.ldexp(p, n.astype(np.int32)))


def log(x: float) -> float:
    """The natural logarithm of a finite float64 of at least 1."""
    half_m, exponent = math.frexp(x)
    m, k = 2.0 * half_m, exponent - 1
    if m > 1.4142135623730951:
        m, k = m * 0.5, k + 1
    f = m - 1.0
    s = f / (2.0 + f)
    z = s * s
    w = z * z
    t1 = w * (3.999999999940941908e-01 + w * (2.222219843214978396e-01 + w * 1.531383769920937332e-01))
    t2 = z * (
        6.666666666666735130e-01
        + w * (2.857142874366239149e-01 + w * (1.818357216161805012e-01 + w * 1.479819860511658591e-01))
    )
    half = (0.5 * f) * f
    rest = s * (half + (t2 + t1)) + k * 1.90821492927058770002e-10
    return k * 6.93147180369123816490e-01 - ((half - rest) - f)


def sine_cosine(x: Array) -> tuple[Array, Array]:
    """Sine and cosine of float64 x in [0, 2^20]."""
    n = (x * 6.36619772367581382433e-01 + 6755399441055744.0) - 6755399441055744.0
    t = x - n * 1.57079632673412561417e00
    w = n * 6.07710050630396597660e-11
    r = t - w
    w = n * 2.02226624879595063154e-21 - ((t - r) - w)
    y = r - w
    tail = (r - y) - w
    z = y * y
    p = 8.33333333332248946124e-03 + z * (
        -1.98412698298579493134e-04
        + z * (2.75573137070700676789e-06 + z * (-2.50507602534068634195e-08 + z * 1.58969099521155010221e-10))
    )
    s = y - ((z * (0.5 * tail - (z * y) * p) - tail) - (z * y) * -1.66666666666666324348e-01)
    q = -2.75573143513906633035e-07 + z * (2.08757232129817482790e-09 + z * -1.13596475577881948265e-11)
    q = -1.38888888888741095749e-03 + z * (2.48015872894767294178e-05 + z * q)
    q = z * (4.16666666666666019037e-02 + z * q)
    half = 0.5 * z
    u = 1.0 - half
    c = u + (((1.0 - u) - half) + (z * q - y * tail))
    quarter = n.astype(np.int64) & 3
    return np.choose(quarter, (s, c, -s, -c)), np.choose(quarter, (c, -s, -c, s))


# Linear layers


def num_segments(width: int) -> int:
    """Leaves of the tree over K: the largest power of two up to 8 with K divisible by 128 times it, else 1."""
    return next((s for s in (8, 4, 2) if width % (K_BLOCK * s) == 0), 1)


def linear(
    x_TK: torch.Tensor, weight_NK: torch.Tensor, bias: torch.Tensor | None = None, is_dot: bool = False
) -> torch.Tensor:
    """y[T, N] = x[T, K] @ weight[N, K].T + bias[N]; is_dot: x rounded to bfloat16, dot-product steps over pairs."""
    y = _product(x_TK, weight_NK, is_dot)
    return torch.from_numpy(y if bias is None else y + bias.numpy())


def rounded(x: torch.Tensor) -> torch.Tensor:
    """x rounded to the nearest bfloat16, ties to even, as float32."""
    bits = x.numpy().view(np.uint32).astype(np.uint64)
    up = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return torch.where(x.isnan(), x, torch.from_numpy(up.astype(np.uint32).view(np.float32)))


def _product(x_TK: torch.Tensor, weight_NK: torch.Tensor, is_dot: bool) -> Array:
    x, weight = (rounded(x_TK) if is_dot else x_TK).numpy(), weight_NK.float().numpy()
    width = x.shape[1]
    length = width // num_segments(width)
    sums = [_segment(x[:, at : at + length], weight[:, at : at + length], is_dot) for at in range(0, width, length)]
    while len(sums) > 1:
        sums = [left + right for left, right in zip(sums[::2], sums[1::2])]
    return sums[0]


def _segment(x: Array, weight: Array, is_dot: bool) -> Array:
    total = None
    for begin in range(0, x.shape[1], K_BLOCK):
        block = np.zeros((x.shape[0], weight.shape[0]), np.float32)
        places = range(begin, min(begin + K_BLOCK, x.shape[1]))
        for k in (k ^ 1 for k in places) if is_dot else places:  # of a pair, the dot product takes the odd one first
            block = (flushed_fma if is_dot else fma)(x[:, k, None], weight[:, k], block)
        total = block if total is None else total + block
    return total


def embedding(ids_T: torch.Tensor, weight_NK: torch.Tensor) -> torch.Tensor:
    """x[T, K] = weight[ids]."""
    return weight_NK[ids_T].float()


# Row-wise operations


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """y[T, D] = x / sqrt(mean(x^2) + eps) * weight."""
    x, width = x_TD.numpy(), x_TD.shape[1]
    lanes = np.zeros((x.shape[0], 16), np.float32)
    for i in range(width):
        lanes[:, i % 16] = fma(x[:, i], x[:, i], lanes[:, i % 16])
    r = np.float32(1.0) / np.sqrt(sum16(lanes) / np.float32(width) + np.float32(eps))
    return torch.from_numpy((x * r[:, None]) * weight_D.numpy())


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, rms_norm(s)) with s = x + delta, rounded."""
    total = torch.from_numpy(x_TD.numpy() + delta_TD.numpy())
    return total, rms_norm(total, weight_D, eps)


def rotary_table(num_positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """[num_positions, head_dim]: the cosines of a position's head_dim / 2 angles, then their sines."""
    with decimal.localcontext(decimal.Context(prec=40)):
        exponents = [-decimal.Decimal(i) / decimal.Decimal(head_dim) for i in range(0, head_dim, 2)]
        inv_freq = np.float32([float(decimal.Decimal(theta) ** exponent) for exponent in exponents])
    if scaling is not None:
        inv_freq = scaling.inverse_frequencies(head_dim, theta)
    angles = np.arange(num_positions, dtype=np.float32)[:, None] * inv_freq
    sine, cosine = sine_cosine(np.float64(angles))
    table = np.concatenate([np.float32(cosine), np.float32(sine)], axis=1)
    return torch.from_numpy(table if scaling is None else table * np.float32(scaling.attention_factor))


def rotary(x_TNH: torch.Tensor, positions_T: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns each head's halves (x1, x2) by the angles of its position."""
    half = x_TNH.shape[2] // 2
    x1, x2 = x_TNH.numpy()[:, :, :half], x_TNH.numpy()[:, :, half:]
    angles = table.numpy()[positions_T.numpy(), None]
    cosine, sine = angles[:, :, :half], angles[:, :, half:]
    return torch.from_numpy(np.concatenate([fma(x1, cosine, -(x2 * sine)), fma(x2, cosine, x1 * sine)], axis=2))


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """y[T, F] = silu(x[:, :F]) * x[:, F:]."""
    gate, up = np.split(x_T2F.numpy(), 2, axis=1)
    with np.errstate(over="ignore"):
        return torch.from_numpy((gate / (np.float32(1.0) + exp(np.float32(0.0) - gate))) * up)


# Attention


def paged_attention(
    q_TNH: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """out[T, N, H]: the rows of each sequence are the last ones of its seq_lens positions, read through its blocks.

    The blocks are float32 or bfloat16, which is widened exactly.
    """
    out = torch.empty_like(q_TNH)
    num_slots = value_blocks.shape[2]
    for table, first, end, length in zip(block_tables.tolist(), cu_seqlens_q, cu_seqlens_q[1:], seq_lens.tolist()):
        slots = [(table[position // num_slots], position % num_slots) for position in range(length)]
        blocks, offsets = torch.tensor(slots, dtype=torch.int64).reshape(-1, 2).unbind(1)
        k_JKH, v_JKH = key_blocks[blocks, :, :, offsets].float(), value_blocks[blocks, :, offsets].float()
        out[first:end] = attention(q_TNH[first:end], k_JKH, v_JKH, scale, window)
    return out


def packed_attention(
    q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, plan: PackedPlan, scale: float, window: int = 0
) -> torch.Tensor:
    """out[T, N, H]: the keys of a segment are its parent's rows, then its own, rounded to the plan's kv_dtype."""
    out = torch.empty_like(q_TNH)
    k_TKH, v_TKH = round_kv(k_TKH, plan.kv_dtype), round_kv(v_TKH, plan.kv_dtype)
    segments = plan.segments.tolist()
    for first, end, parent in segments:
        prefix = range(*segments[parent][:2]) if parent >= 0 else range(0)
        rows = torch.tensor([*prefix, *range(first, end)], dtype=torch.int64)
        out[first:end] = attention(q_TNH[first:end], k_TKH[rows], v_TKH[rows], scale, window)
    return out


def round_kv(x_TKH: torch.Tensor, kv_dtype: torch.dtype) -> torch.Tensor:
    """x as it is kept: itself in float32, or the nearest bfloat16, ties to even; float32 either way."""
    if kv_dtype is torch.float32:
        return x_TKH
    words = x_TKH.contiguous().numpy().view(np.uint32)
    rounded = (words + np.uint32(0x7FFF) + ((words >> np.uint32(16)) & np.uint32(1))) & np.uint32(0xFFFF0000)
    rounded = np.where(np.isnan(x_TKH.numpy()), np.uint32(0x7FC00000), rounded)
    return torch.from_numpy(rounded.view(np.float32))


def attention(
    q_RNH: torch.Tensor, k_JKH: torch.Tensor, v_JKH: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """out[R, N, H] of one sequence of J positions, of which q holds the last R."""
    num_rows, num_heads, _ = q_RNH.shape
    num_keys, num_kv_heads, _ = k_JKH.shape
    last = np.arange(num_keys - num_rows, num_keys) + 1  # a row's keys are [first, last)
    first = np.maximum(last - window, 0) if window > 0 else np.zeros_like(last)
    out = np.empty(q_RNH.shape, np.float32)
    for head in range(num_heads):
        kv_head = head // (num_heads // num_kv_heads)
        q, k, v = q_RNH[:, head].numpy(), k_JKH[:, kv_head].numpy(), v_JKH[:, kv_head].numpy()
        out[:, head] = _attend(q, k, v, first, last, np.float32(scale))
    return torch.from_numpy(out)


def _attend(q_RH: Array, k_JH: Array, v_JH: Array, first: Array, last: Array, scale: np.float32) -> Array:
    """One head: chunks of 256 keys in ascending order, each merged into what the row has so far."""
    out, total = np.zeros_like(q_RH), np.zeros(len(q_RH), np.float32)
    highest, has_begun = np.zeros(len(q_RH), np.float32), np.zeros(len(q_RH), bool)
    for base in range(0, len(k_JH), KEY_CHUNK):
        keys = np.arange(base, min(base + KEY_CHUNK, len(k_JH)))
        in_reach = (first[:, None] <= keys) & (keys < last[:, None])
        chunk_highest, chunk_total, chunk_out = _attend_chunk(q_RH, k_JH[keys], v_JH[keys], in_reach, scale)
        is_seen = in_reach.any(axis=1)
        m = np.where(highest > chunk_highest, highest, chunk_highest)
        a, b = exp(highest - m), exp(chunk_highest - m)
        merged_total = fma(chunk_total, b, total * a)
        merged_out = fma(chunk_out, b[:, None], out * a[:, None])
        is_first = is_seen & ~has_begun
        is_later = is_seen & has_begun
        highest = np.where(is_first, chunk_highest, np.where(is_later, m, highest))
        total = np.where(is_first, chunk_total, np.where(is_later, merged_total, total))
        out = np.where(is_first[:, None], chunk_out, np.where(is_later[:, None], merged_out, out))
        has_begun |= is_seen
    return out / total[:, None]


def _attend_chunk(
    q_RH: Array, k_JH: Array, v_JH: Array, in_reach_RJ: Array, scale: np.float32
) -> tuple[Array, Array, Array]:
    """(maximum, sum of exponentials, weighted values) over the keys of one chunk that each row reaches."""
    chains = np.zeros((4, len(q_RH), len(k_JH)), np.float32)
    for d in range(q_RH.shape[1]):
        chains[d % 4] = fma(q_RH[:, d, None], k_JH[:, d], chains[d % 4])
    scores = ((chains[0] + chains[1]) + (chains[2] + chains[3])) * scale
    highest = np.where(in_reach_RJ, scores, np.float32(-np.inf)).max(axis=1)
    highest = np.where(in_reach_RJ.any(axis=1), highest, np.float32(0.0))  # a row without keys here is not merged
    p = exp(scores - highest[:, None])
    lanes, out = np.zeros((len(q_RH), 16), np.float32), np.zeros_like(q_RH)
    for j in range(len(k_JH)):
        seen = in_reach_RJ[:, j]
        lanes[:, j % 16] = np.where(seen, lanes[:, j % 16] + p[:, j], lanes[:, j % 16])
        out = np.where(seen[:, None], fma(p[:, j, None], v_JH[j], out), out)
    return highest, sum16(lanes), out


# Log-probabilities and sampling


def vocab_stats(
    hidden_TD: torch.Tensor, weight_VD: torch.Tensor, temperature_T: torch.Tensor, is_dot: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """(block_max, block_sum), each [T, ceil(V / 64)]: maximum and sum of exponentials of each vocabulary block."""
    z_TB64 = _blocks(_logits(hidden_TD, weight_VD, temperature_T, is_dot))
    block_max = z_TB64.max(axis=2)
    with np.errstate(over="ignore"):
        e = exp(z_TB64 - block_max[:, :, None])
    quarters = (e[..., :16] + e[..., 16:32]) + (e[..., 32:48] + e[..., 48:])
    return torch.from_numpy(block_max), torch.from_numpy(sum16(quarters))


def token_logprobs(
    hidden_CD: torch.Tensor,
    weight_VD: torch.Tensor,
    target_ids: torch.Tensor,
    temperature: torch.Tensor,
    is_dot: bool = False,
) -> torch.Tensor:
    """logprobs[C] of target_ids under softmax(hidden @ weight.T / temperature)."""
    z_CV = _logits(hidden_CD, weight_VD, temperature, is_dot)
    block_max, block_sum = vocab_stats(hidden_CD, weight_VD, temperature, is_dot)
    logprobs = []
    for z, maxima, sums, token in zip(z_CV, block_max.numpy(), block_sum.numpy(), target_ids.tolist()):
        top, masses = _masses(maxima, sums)
        logprobs.append((z[token] - top) - np.float32(log(_running_totals(masses)[-1])))
    return torch.from_numpy(np.array(logprobs, np.float32))


def sample(
    hidden_TD: torch.Tensor,
    weight_VD: torch.Tensor,
    temperature_T: torch.Tensor,
    rows: torch.Tensor,
    seeds: torch.Tensor,
    positions: torch.Tensor,
    indices: torch.Tensor,
    is_greedy: torch.Tensor,
    is_dot: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(token_ids [n], logprobs [n]) of one draw for each entry of `rows`."""
    z_TV = _logits(hidden_TD, weight_VD, temperature_T, is_dot)
    block_max, block_sum = vocab_stats(hidden_TD, weight_VD, temperature_T, is_dot)
    tokens = []
    for row, seed, position, index, greedy in zip(*(x.tolist() for x in (rows, seeds, positions, indices, is_greedy))):
        if greedy:
            tokens.append(int(np.argmax(z_TV[row])))  # the first of equals
        else:
            u = uniform(seed, position, index)
            tokens.append(drawn_token(z_TV[row], block_max[row].numpy(), block_sum[row].numpy(), u))
    token_ids = torch.tensor(tokens, dtype=torch.int64)
    return token_ids, token_logprobs(hidden_TD[rows], weight_VD, token_ids, temperature_T[rows], is_dot)


def philox(counter: tuple[int, int, int, int], key: int) -> tuple[int, int, int, int]:
    """Philox4x32-10 under a 64-bit key (Salmon, Moraes, Dror, Shaw, 2011)."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * c0, 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c2, 1 << 32)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) % (1 << 32), (k1 + 0xBB67AE85) % (1 << 32)
    return c0, c1, c2, c3


def uniform(seed: int, position: int, index: int) -> float:
    """u in [0, 1), a multiple of 2^-53, for one draw."""
    c0, c1, _, _ = philox((position % (1 << 32), index % (1 << 32), 0, 0), seed % (1 << 64))
    return ((c0 << 32 | c1) >> 11) * 2.0**-53


def _logits(hidden: torch.Tensor, weight: torch.Tensor, temperature: torch.Tensor, is_dot: bool) -> Array:
    return _product(hidden, weight, is_dot) / temperature.numpy()[:, None]


def _blocks(z_TV: Array) -> Array:
    """[T, B, 64]: the last block is filled up with -inf, whose exponential is +0."""
    missing = -z_TV.shape[1] % VOCAB_BLOCK
    padded = np.pad(z_TV, ((0, 0), (0, missing)), constant_values=-np.inf)
    return padded.reshape(len(z_TV), -1, VOCAB_BLOCK)


def _masses(block_max: Array, block_sum: Array) -> tuple[np.float32, list[float]]:
    """The highest logit of a row and each block's sum of exponentials relative to it, exact in float64."""
    top = block_max.max()
    with np.errstate(over="ignore"):
        factors = exp(block_max - top)
    return top, [float(s) * float(factor) for s, factor in zip(block_sum, factors)]


def _running_totals(masses: list[float]) -> list[float]:
    """C_b, left to right in float64 (the built-in sum compensates from Python 3.12 on, so it will not do)."""
    return list(itertools.accumulate(masses, initial=0.0))[1:]


def drawn_token(z_V: Array, block_max: Array, block_sum: Array, u: float) -> int:
    """The first block whose running total passes u times the total; inside it the first id; else the last with mass."""
    top, masses = _masses(block_max, block_sum)
    totals = _running_totals(masses)
    target = u * totals[-1]
    block = next((b for b, total in enumerate(totals) if total > target), None)
    begin = VOCAB_BLOCK * (block if block is not None else max(b for b, mass in enumerate(masses) if mass > 0))
    z = z_V[begin : begin + VOCAB_BLOCK]
    highest = z.max()
    e, scale = exp(z - highest), float(exp(highest - top))
    if block is not None:
        running = totals[block - 1] if block else 0.0
        for i in range(len(z)):
            running += float(e[i]) * scale
            if running > target:
                return begin + i
    return begin + int(np.flatnonzero(e > 0)[-1])


# Digests of weights


def tensor_digest(tensor: torch.Tensor) -> bytes:
    """The 16-byte digest of a contiguous float32 tensor's bits and shape."""
    words = tensor.numpy().reshape(-1).view(np.uint32).tolist()
    digest = hashlib.blake2b(repr(tuple(tensor.shape)).encode(), digest_size=16)
    for begin in range(0, len(words), DIGEST_PIECE):
        lanes = [(lane + 1) * DIGEST_PRIME % (1 << 64) for lane in range(8)]
        for i, word in enumerate(words[begin : begin + DIGEST_PIECE]):
            h = (lanes[i % 8] ^ word) * DIGEST_PRIME % (1 << 64)
            lanes[i % 8] = h ^ (h >> 32)
        digest.update(np.array(lanes, "<u8").tobytes())
    return digest.digest()
