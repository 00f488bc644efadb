"""Attention over blocks of keys and values, for engine and trainer (docs/numerics.md, "GPU profile").

Key and value blocks of a layer are both [P, K, S, H]: P blocks, K key-value heads, S slots, H head width. A tile of 64
rows (tokens times the query heads of one key-value head) visits keys in steps of 64 and chunks of 256 absolute
positions. Chunks are merged in ascending order: in the program that computed them, or, where few rows have long
contexts, by a second kernel that reads the chunks' partial results. Both do the same arithmetic in the same order.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import NEGATIVE_INFINITY, product, rounded
from kernels.gpu.launch import aligned, aligned_rows, launch
from kernels.gpu.tiles import (
    COPY_WORDS,
    KEY_CHUNK,
    KEY_TILE,
    MAX_SPLIT_PARTIALS,
    MAX_WHOLE_PROGRAMS,
    QUERY_ROWS,
    SPLIT_PROGRAMS,
)

HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 128
NUM_WARPS = 4
NUM_STAGES = {torch.bfloat16: 2, torch.float32: 1}


def check_attention_shape(head_dim: int, block_size: int) -> None:
    """Raises ValueError for a head width or a block size that the kernel does not take."""
    if head_dim % HEAD_DIM_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM} on CUDA")
    if block_size <= 0:
        raise ValueError(f"block_size={block_size} must be positive")


def kv_store(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    slot_mapping: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Writes rows of k and v into slots, in place: row `rows[i]` goes to slot_mapping[i] = block * S + slot.

    slot_mapping and rows are int64; rows None stands for 0, 1, 2, ... A negative slot stores nothing: a captured graph
    has rows to spare. k and v may be strided over rows; they are rounded to the type of the blocks.
    """
    _, num_kv_heads, num_slots, head_dim = key_blocks.shape
    k, v = aligned_rows(k_TKH), aligned_rows(v_TKH)
    launch(
        _kv_store_kernel, (slot_mapping.shape[0], num_kv_heads), k, v, key_blocks, value_blocks, slot_mapping, rows,
        K=num_kv_heads, H=head_dim, S=num_slots, K_STRIDE=k.stride(0), V_STRIDE=v.stride(0),
        BLOCK_H=triton.next_power_of_2(head_dim), num_warps=1,
    )  # fmt: skip


def copy_blocks(storage: torch.Tensor, pairs: torch.Tensor) -> None:
    """Copies blocks, (source, destination) row by row of pairs [n, 2], in every plane of storage [planes, P, ...].

    pairs is int64; the storage is contiguous and its blocks hold a multiple of four bytes.
    """
    words = storage.view(storage.shape[0], storage.shape[1], -1).view(torch.int32)
    num_planes, num_blocks, width = words.shape
    launch(
        _copy_blocks_kernel, (num_planes, triton.cdiv(width, COPY_WORDS)), words, pairs, pairs.shape[0],
        P=num_blocks, WIDTH=width, BLOCK=COPY_WORDS, num_warps=4,
    )  # fmt: skip


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
    """out[T, N, H]: rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) are the last of seq_lens[b] positions of sequence b.

    block_tables [B, max_blocks], cu_seqlens_q [B + 1] and seq_lens [B] are int32 on the device. `window` > 0 limits how
    many keys a row sees, itself included. q has the type of the blocks, and so has the result.
    """
    num_rows, num_heads, _ = q_TNH.shape
    _, num_kv_heads, num_slots, _ = key_blocks.shape
    num_chunks = triton.cdiv(block_tables.shape[1] * num_slots, KEY_CHUNK)
    num_tiles = num_query_tiles(num_rows, seq_lens.shape[0], num_heads // num_kv_heads)
    few_programs = num_tiles * num_kv_heads <= MAX_WHOLE_PROGRAMS
    if num_chunks > 1 and few_programs and num_rows * num_chunks <= MAX_SPLIT_PARTIALS:
        return split_attention(q_TNH, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window)
    return whole_attention(q_TNH, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window)[0]


def num_query_tiles(num_rows: int, num_sequences: int, group: int) -> int:
    """Programs along the rows: enough for any way in which the rows may fall to the sequences."""
    return num_rows // (QUERY_ROWS // group) + num_sequences


def whole_attention(
    q, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window=0
) -> tuple[torch.Tensor, torch.Tensor]:
    """(out [T, N, H], row_lse [T, N]): one program takes all keys of a tile of rows.

    row_lse is the base-2 logarithm of a row's sum of exponentials, which the backward pass needs.
    """
    q, shape = _checked(q, key_blocks)
    num_rows, num_heads, _ = q.shape
    num_kv_heads = key_blocks.shape[1]
    out = q.new_empty(q.shape)
    row_lse = q.new_empty(num_rows, num_heads, dtype=torch.float32)
    num_tiles = num_query_tiles(num_rows, seq_lens.shape[0], num_heads // num_kv_heads)
    launch(
        _whole_kernel, (num_tiles, num_kv_heads), q, key_blocks, value_blocks, aligned(block_tables), cu_seqlens_q,
        seq_lens, out, row_lse, seq_lens.shape[0], block_tables.shape[1], scale / math.log(2), WINDOW=window,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES[q.dtype], **shape,
    )  # fmt: skip
    return out, row_lse


def split_attention(q, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window=0) -> torch.Tensor:
    """out [T, N, H]: several programs share the chunks of keys of a tile of rows, then one merges a row's chunks."""
    q, shape = _checked(q, key_blocks)
    num_rows, num_heads, head_dim = q.shape
    num_kv_heads, num_slots = key_blocks.shape[1:3]
    group, num_sequences = num_heads // num_kv_heads, seq_lens.shape[0]
    num_chunks = triton.cdiv(block_tables.shape[1] * num_slots, KEY_CHUNK)
    out = q.new_empty(q.shape)
    partial_max = q.new_empty(num_chunks, num_rows, num_heads, dtype=torch.float32)
    num_tiles = num_query_tiles(num_rows, num_sequences, group)
    num_sharing = min(num_chunks, triton.cdiv(SPLIT_PROGRAMS, max(1, num_tiles * num_kv_heads)))
    partial_sum, partial_out = torch.empty_like(partial_max), q.new_empty(num_chunks, *q.shape, dtype=torch.float32)
    launch(
        _chunk_kernel, (num_tiles, num_kv_heads, num_sharing), q, key_blocks,
        value_blocks, aligned(block_tables), cu_seqlens_q, seq_lens, partial_max, partial_sum, partial_out,
        num_sequences, num_rows, block_tables.shape[1], scale / math.log(2), WINDOW=window,
        num_warps=NUM_WARPS, num_stages=NUM_STAGES[q.dtype], **shape,
    )  # fmt: skip
    launch(
        _merge_kernel, (num_rows, num_kv_heads), partial_max, partial_sum, partial_out, cu_seqlens_q, seq_lens, out,
        num_sequences, num_rows, N=num_heads, G=group, H=head_dim, WINDOW=window, CHUNK=KEY_CHUNK,
        BLOCK_G=triton.next_power_of_2(group), BLOCK_H=shape["BLOCK_H"], num_warps=NUM_WARPS,
    )  # fmt: skip
    return out


def _checked(q, key_blocks):
    """(q as the kernels read it, the constants of the shape)."""
    _, num_heads, head_dim = q.shape
    _, num_kv_heads, num_slots, _ = key_blocks.shape
    check_attention_shape(head_dim, num_slots)
    if q.dtype is not key_blocks.dtype or q.dtype not in NUM_STAGES:
        raise ValueError(f"q is {q.dtype}, the key blocks {key_blocks.dtype}: both must be bfloat16, or both float32")
    group = num_heads // num_kv_heads
    if num_heads % num_kv_heads or group > QUERY_ROWS:
        raise ValueError(f"{num_heads} query heads must be 1 to {QUERY_ROWS} times the {num_kv_heads} key-value heads")
    q = aligned_rows(q)
    return q, {
        "N": num_heads, "K": num_kv_heads, "G": group, "H": head_dim, "S": num_slots, "Q_STRIDE": q.stride(0),
        "BLOCK_M": QUERY_ROWS, "BLOCK_H": max(16, triton.next_power_of_2(head_dim)), "TILE": KEY_TILE,
        "CHUNK": KEY_CHUNK,
    }  # fmt: skip


@triton.jit
def _kv_store_kernel(
    k, v, key_blocks, value_blocks, slot_mapping, rows,
    K: tl.constexpr, H: tl.constexpr, S: tl.constexpr, K_STRIDE: tl.constexpr, V_STRIDE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):  # fmt: skip
    entry, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(slot_mapping + entry)
    if slot >= 0:
        row = entry.to(tl.int64)
        if rows is not None:
            row = tl.load(rows + entry)
        d = tl.arange(0, BLOCK_H)
        place = (((slot // S) * K + head) * S + slot % S) * H + d
        key = tl.load(k + row * K_STRIDE + head * H + d, mask=d < H).to(tl.float32)
        value = tl.load(v + row * V_STRIDE + head * H + d, mask=d < H).to(tl.float32)
        tl.store(key_blocks + place, rounded(key, key_blocks.dtype.element_ty), mask=d < H)
        tl.store(value_blocks + place, rounded(value, value_blocks.dtype.element_ty), mask=d < H)


@triton.jit(do_not_specialize=["num_pairs"])
def _copy_blocks_kernel(words, pairs, num_pairs, P: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """A program takes its words of every pair in turn, so a block may be copied to and then from."""
    plane = words + tl.program_id(0).to(tl.int64) * P * WIDTH
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    for pair in range(num_pairs):
        source, destination = tl.load(pairs + 2 * pair), tl.load(pairs + 2 * pair + 1)
        tl.store(plane + destination * WIDTH + i, tl.load(plane + source * WIDTH + i, mask=i < WIDTH), mask=i < WIDTH)


@triton.jit(do_not_specialize=["num_sequences", "table_width"])
def _whole_kernel(
    q, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, out, row_lse, num_sequences, table_width,
    scale, WINDOW: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr, Q_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    sequence, rows, heads, has_row, positions, first_key, end_key = _query_tile(
        cu_seqlens_q, seq_lens, num_sequences, kv_head, WINDOW, G, BLOCK_M
    )
    if first_key < end_key:
        table = block_tables + sequence.to(tl.int64) * table_width
        queries = _load_queries(q, rows, heads, has_row, H, Q_STRIDE, BLOCK_H)
        highest = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
        for chunk in range(first_key // CHUNK, (end_key + CHUNK - 1) // CHUNK):
            chunk_highest, chunk_total, chunk_sums = _attend_chunk(
                queries, key_blocks, value_blocks, table, chunk, first_key, end_key, positions, kv_head, scale,
                WINDOW, K, H, S, BLOCK_M, BLOCK_H, TILE, CHUNK,
            )  # fmt: skip
            highest, total, sums = _merge(highest, total, sums, chunk_highest, chunk_total, chunk_sums)
        d = tl.arange(0, BLOCK_H)
        row_heads = rows.to(tl.int64) * N + heads
        total = tl.where(has_row, total, 1.0)
        result = tl.math.div_rn(sums, tl.broadcast_to(total[:, None], (BLOCK_M, BLOCK_H)))
        place = out + row_heads[:, None] * H + d[None, :]
        tl.store(place, rounded(result, out.dtype.element_ty), mask=has_row[:, None] & (d < H)[None, :])
        tl.store(row_lse + row_heads, highest + tl.log2(total), mask=has_row)


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "table_width"])
def _chunk_kernel(
    q, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, partial_max, partial_sum, partial_out,
    num_sequences, num_rows, table_width, scale,
    WINDOW: tl.constexpr,
    N: tl.constexpr, K: tl.constexpr, G: tl.constexpr, H: tl.constexpr, S: tl.constexpr, Q_STRIDE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    kv_head = tl.program_id(1)
    sequence, rows, heads, has_row, positions, first_key, end_key = _query_tile(
        cu_seqlens_q, seq_lens, num_sequences, kv_head, WINDOW, G, BLOCK_M
    )
    if first_key < end_key:
        table = block_tables + sequence.to(tl.int64) * table_width
        queries = _load_queries(q, rows, heads, has_row, H, Q_STRIDE, BLOCK_H)
        d = tl.arange(0, BLOCK_H)
        first_chunk = first_key // CHUNK + tl.program_id(2)
        for chunk in range(first_chunk, (end_key + CHUNK - 1) // CHUNK, tl.num_programs(2)):
            highest, total, sums = _attend_chunk(
                queries, key_blocks, value_blocks, table, chunk, first_key, end_key, positions, kv_head, scale,
                WINDOW, K, H, S, BLOCK_M, BLOCK_H, TILE, CHUNK,
            )  # fmt: skip
            row_heads = (tl.cast(chunk, tl.int64) * num_rows + rows) * N + heads
            tl.store(partial_max + row_heads, highest, mask=has_row)
            tl.store(partial_sum + row_heads, total, mask=has_row)
            place = partial_out + row_heads[:, None] * H + d[None, :]
            tl.store(place, sums, mask=has_row[:, None] & (d < H)[None, :])


@triton.jit(do_not_specialize=["num_sequences", "num_rows"])
def _merge_kernel(
    partial_max, partial_sum, partial_out, cu_seqlens_q, seq_lens, out, num_sequences, num_rows,
    N: tl.constexpr, G: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Merges the chunks of one row, for the query heads of one key-value head."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    sequence = _last_at_most(cu_seqlens_q, row, num_sequences, 1, 0)
    end_row = tl.load(cu_seqlens_q + sequence + 1)
    position = tl.load(seq_lens + sequence) - (end_row - row)
    if row < end_row:
        first_key = _first_key(position, WINDOW)
        g, d = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_H)
        has_head, has = g < G, (g < G)[:, None] & (d < H)[None, :]
        highest = tl.full((BLOCK_G,), NEGATIVE_INFINITY, tl.float32)
        total, sums = tl.zeros((BLOCK_G,), tl.float32), tl.zeros((BLOCK_G, BLOCK_H), tl.float32)
        for chunk in range(first_key // CHUNK, position // CHUNK + 1):
            row_heads = (tl.cast(chunk, tl.int64) * num_rows + row) * N + kv_head * G + g
            chunk_highest = tl.load(partial_max + row_heads, mask=has_head, other=NEGATIVE_INFINITY)
            chunk_total = tl.load(partial_sum + row_heads, mask=has_head, other=0.0)
            chunk_sums = tl.load(partial_out + row_heads[:, None] * H + d[None, :], mask=has, other=0.0)
            highest, total, sums = _merge(highest, total, sums, chunk_highest, chunk_total, chunk_sums)
        total = tl.where(has_head, total, 1.0)
        result = tl.math.div_rn(sums, tl.broadcast_to(total[:, None], (BLOCK_G, BLOCK_H)))
        place = out + (row.to(tl.int64) * N + kv_head * G + g)[:, None] * H + d[None, :]
        tl.store(place, rounded(result, out.dtype.element_ty), mask=has)


@triton.jit
def _query_tile(
    cu_seqlens_q, seq_lens, num_sequences, kv_head, WINDOW: tl.constexpr, G: tl.constexpr, BLOCK_M: tl.constexpr
):
    """This program's rows: (sequence, rows, heads, has_row, positions, first key, end of the keys that they see).

    Tiles are numbered so that sequence b begins at tile cu_seqlens_q[b] // TOKENS + b, which leaves it enough of them
    whatever the lengths. A tile without rows sees no keys.
    """
    TOKENS: tl.constexpr = BLOCK_M // G
    tile = tl.program_id(0)
    sequence = _last_at_most(cu_seqlens_q, tile, num_sequences, TOKENS, 1)
    first_row, end_row = tl.load(cu_seqlens_q + sequence), tl.load(cu_seqlens_q + sequence + 1)
    first = first_row + (tile - (first_row // TOKENS + sequence)) * TOKENS
    r = tl.arange(0, BLOCK_M)
    rows = first + r // G
    has_row = (r < TOKENS * G) & (rows < end_row)
    positions = tl.load(seq_lens + sequence) - end_row + rows
    last_row = tl.minimum(first + TOKENS, end_row) - 1
    end_key = tl.load(seq_lens + sequence) - end_row + last_row + 1
    first_key = _first_key(end_key - 1 - (last_row - first), WINDOW)
    return sequence, rows, kv_head * G + r % G, has_row, positions, first_key, tl.where(first < end_row, end_key, 0)


@triton.jit
def _last_at_most(starts, value, num_sequences, DIVISOR: tl.constexpr, STEP: tl.constexpr):
    """The last sequence b with starts[b] // DIVISOR + STEP * b <= value, by bisection."""
    low, high = 0, num_sequences
    while high - low > 1:
        middle = (low + high) // 2
        is_below = tl.load(starts + middle) // DIVISOR + STEP * middle <= value
        low, high = tl.where(is_below, middle, low), tl.where(is_below, high, middle)
    return low


@triton.jit
def _first_key(position, WINDOW: tl.constexpr):
    return tl.maximum(position + 1 - WINDOW, 0) if WINDOW > 0 else position * 0


@triton.jit
def _load_queries(q, rows, heads, has_row, H: tl.constexpr, Q_STRIDE: tl.constexpr, BLOCK_H: tl.constexpr):
    d = tl.arange(0, BLOCK_H)
    place = rows.to(tl.int64)[:, None] * Q_STRIDE + heads[:, None] * H + d[None, :]
    return tl.load(q + place, mask=has_row[:, None] & (d < H)[None, :], other=0.0)


@triton.jit
def _attend_chunk(
    queries, key_blocks, value_blocks, table, chunk, first_key, end_key, positions, kv_head, scale,
    WINDOW: tl.constexpr, K: tl.constexpr, H: tl.constexpr, S: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """(maximum, sum of exponentials, weighted values) of each row over the keys of one chunk that it sees.

    A step in which a row sees no key changes nothing for it: the factor is 1, the summands are 0. So it does not matter
    which other rows the tile has, by which the steps are chosen.
    """
    d = tl.arange(0, BLOCK_H)
    highest = tl.full((BLOCK_M,), NEGATIVE_INFINITY, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    sums = tl.zeros((BLOCK_M, BLOCK_H), tl.float32)
    begin = tl.maximum(chunk * CHUNK, first_key // TILE * TILE)
    for start in range(begin, tl.minimum((chunk + 1) * CHUNK, end_key), TILE):
        j = start + tl.arange(0, TILE)
        has_key = j < end_key
        block = tl.load(table + j // S, mask=has_key, other=0).to(tl.int64)
        slots = ((block * K + kv_head) * S + j % S) * H
        keys = tl.load(
            key_blocks + slots[None, :] + d[:, None], mask=has_key[None, :] & (d < H)[:, None], other=0.0
        )  # fmt: skip
        scores = product(queries, keys, tl.zeros((BLOCK_M, TILE), tl.float32)) * scale
        is_seen = (j[None, :] <= positions[:, None]) & has_key[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (j[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(is_seen, scores, NEGATIVE_INFINITY)
        raised = tl.maximum(highest, tl.max(scores, axis=1))
        reference = _finite(raised)
        weights = tl.exp2(scores - reference[:, None])
        factor = tl.exp2(highest - reference)
        total = tl.fma(total, factor, tl.sum(weights, axis=1))
        values = tl.load(
            value_blocks + slots[:, None] + d[None, :], mask=has_key[:, None] & (d < H)[None, :], other=0.0
        )  # fmt: skip
        sums = product(rounded(weights, values.dtype), values, sums * factor[:, None])
        highest = raised
    return highest, total, sums


@triton.jit
def _merge(highest, total, sums, chunk_highest, chunk_total, chunk_sums):
    """Adds a chunk to what the rows have; a chunk that a row does not see changes nothing for it."""
    raised = tl.maximum(highest, chunk_highest)
    reference = _finite(raised)
    a, b = tl.exp2(highest - reference), tl.exp2(chunk_highest - reference)
    total = tl.fma(chunk_total, b, total * a)
    sums = tl.fma(chunk_sums, tl.broadcast_to(b[:, None], chunk_sums.shape), sums * a[:, None])
    return raised, total, sums


@triton.jit
def _finite(highest):
    """0 for a row that has seen no key yet, whose exponentials are then 0 and not NaN."""
    return tl.where(highest == NEGATIVE_INFINITY, 0.0, highest)
