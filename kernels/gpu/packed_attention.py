"""Attention of a packed training batch, differentiable: forward through blocks as the engine's, backward over rows.

The backward pass is repeatable: a program sums for its own rows or keys, in a fixed order, and shares with nobody.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import product, rounded
from kernels.gpu.attention import kv_store, whole_attention
from kernels.gpu.launch import aligned, launch
from kernels.gpu.packed_plan import PackedPlan
from kernels.gpu.tiles import BACKWARD_TILE

NUM_WARPS = 4
NUM_STAGES = 1


def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: PackedPlan,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """out[T, N, H] for a packed batch: the rows are laid out in blocks, then the engine's kernel runs."""
    if torch.is_grad_enabled() and (q_TNH.requires_grad or k_TKH.requires_grad or v_TKH.requires_grad):
        return _PackedAttention.apply(q_TNH, k_TKH, v_TKH, plan, scale, window)
    return _packed_forward(q_TNH, k_TKH, v_TKH, plan, scale, window)[0]


def _packed_forward(q, k, v, plan, scale, window):
    key_blocks, value_blocks = plan.blocks(k.shape[1], k.shape[2], q.dtype)
    kv_store(k, v, key_blocks, value_blocks, plan.slot_mapping, plan.rows)
    tables, starts, lengths = plan.block_tables, plan.cu_seqlens_q, plan.seq_lens
    return whole_attention(q, key_blocks, value_blocks, tables, starts, lengths, scale, window)


def _packed_backward(q, k, v, out, row_lse, grad, plan, scale, window):
    num_heads, num_kv_heads, head_dim = q.shape[1], k.shape[1], q.shape[2]
    q, k, v, grad = aligned(q), aligned(k), aligned(v), aligned(grad)
    row_delta = (grad.float() * out.float()).sum(-1)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    rows = (q, k, v, grad, row_lse, row_delta, plan.positions)
    scales = (scale / math.log(2), float(scale))
    shape = {
        "N": num_heads, "K": num_kv_heads, "H": head_dim, "WINDOW": window, "TILE": BACKWARD_TILE,
        "BLOCK_H": max(16, triton.next_power_of_2(head_dim)), "num_warps": NUM_WARPS, "num_stages": NUM_STAGES,
    }  # fmt: skip
    query_grid, key_grid = (plan.query_tiles.shape[0], num_heads), (plan.key_tiles.shape[0], num_kv_heads)
    launch(_query_gradient_kernel, query_grid, *rows, plan.query_tiles, dq, *scales, **shape)
    launch(_key_value_gradient_kernel, key_grid, *rows, plan.key_tiles, dk, dv, *scales, **shape)
    return dq, dk, dv


@triton.jit
def _query_gradient_kernel(
    q, k, v, grad, row_lse, row_delta, positions, tiles, dq, scale_base_2, scale,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    tile, head = tiles + 5 * tl.program_id(0), tl.program_id(1)
    first, end = tl.load(tile), tl.load(tile + 1)
    rows, has = first + tl.arange(0, TILE), first + tl.arange(0, TILE) < end
    queries, grads = _load_rows(q, rows, has, head, N, H, BLOCK_H), _load_rows(grad, rows, has, head, N, H, BLOCK_H)
    lse = tl.load(row_lse + rows * N + head, mask=has, other=0.0)
    delta = tl.load(row_delta + rows * N + head, mask=has, other=0.0)
    row_positions = tl.load(positions + rows, mask=has, other=-1)
    sums = tl.zeros((TILE, BLOCK_H), tl.float32)
    for part in tl.static_range(2):  # the parent's keys, then the segment's own
        begin = tl.load(tile + 2 + 2 * part)
        stop = tl.load(tile + 3) if part == 0 else end
        for start in range(begin, stop, TILE):
            j, has_key = start + tl.arange(0, TILE), start + tl.arange(0, TILE) < stop
            keys = _load_rows(k, j, has_key, head // (N // K), K, H, BLOCK_H)
            values = _load_rows(v, j, has_key, head // (N // K), K, H, BLOCK_H)
            key_positions = tl.load(positions + j, mask=has_key, other=0)
            is_seen = _is_seen(row_positions[:, None], key_positions[None, :], WINDOW) & has_key[None, :]
            scores = product(queries, tl.trans(keys), tl.zeros((TILE, TILE), tl.float32)) * scale_base_2
            p = tl.where(is_seen, tl.exp2(scores - lse[:, None]), 0.0)
            dp = product(grads, tl.trans(values), tl.zeros((TILE, TILE), tl.float32))
            sums = product(rounded(p * (dp - delta[:, None]), keys.dtype), keys, sums)
    _store_rows(dq, rows, has, head, sums * scale, N, H, BLOCK_H)


@triton.jit
def _key_value_gradient_kernel(
    q, k, v, grad, row_lse, row_delta, positions, tiles, dk, dv, scale_base_2, scale,
    N: tl.constexpr, K: tl.constexpr, H: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The query heads of the key-value head in turn, for each of them the rows in ascending order."""
    tile, kv_head = tiles + 3 * tl.program_id(0), tl.program_id(1)
    first, end, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    j, has_key = first + tl.arange(0, TILE), first + tl.arange(0, TILE) < end
    keys, values = _load_rows(k, j, has_key, kv_head, K, H, BLOCK_H), _load_rows(v, j, has_key, kv_head, K, H, BLOCK_H)
    key_positions = tl.load(positions + j, mask=has_key, other=0)
    key_sums, value_sums = tl.zeros((TILE, BLOCK_H), tl.float32), tl.zeros((TILE, BLOCK_H), tl.float32)
    for head in range(kv_head * (N // K), (kv_head + 1) * (N // K)):
        for start in range(first, stop, TILE):
            rows, has = start + tl.arange(0, TILE), start + tl.arange(0, TILE) < stop
            queries = _load_rows(q, rows, has, head, N, H, BLOCK_H)
            grads = _load_rows(grad, rows, has, head, N, H, BLOCK_H)
            lse = tl.load(row_lse + rows * N + head, mask=has, other=0.0)
            delta = tl.load(row_delta + rows * N + head, mask=has, other=0.0)
            row_positions = tl.load(positions + rows, mask=has, other=-1)
            is_seen = _is_seen(row_positions[None, :], key_positions[:, None], WINDOW) & has_key[:, None]
            scores = product(keys, tl.trans(queries), tl.zeros((TILE, TILE), tl.float32)) * scale_base_2
            p = tl.where(is_seen, tl.exp2(scores - lse[None, :]), 0.0)
            value_sums = product(rounded(p, grads.dtype), grads, value_sums)
            dp = product(values, tl.trans(grads), tl.zeros((TILE, TILE), tl.float32))
            key_sums = product(rounded(p * (dp - delta[None, :]), queries.dtype), queries, key_sums)
    _store_rows(dk, j, has_key, kv_head, key_sums * scale, K, H, BLOCK_H)
    _store_rows(dv, j, has_key, kv_head, value_sums, K, H, BLOCK_H)


@triton.jit
def _is_seen(row_positions, key_positions, WINDOW: tl.constexpr):
    is_seen = key_positions <= row_positions
    if WINDOW > 0:
        is_seen = is_seen & (key_positions > row_positions - WINDOW)
    return is_seen


@triton.jit
def _load_rows(x, rows, has, head, HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    d = tl.arange(0, BLOCK_H)
    place = (rows.to(tl.int64) * HEADS + head)[:, None] * H + d[None, :]
    return tl.load(x + place, mask=has[:, None] & (d < H)[None, :], other=0.0)


@triton.jit
def _store_rows(x, rows, has, head, values, HEADS: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr):
    d = tl.arange(0, BLOCK_H)
    place = (rows.to(tl.int64) * HEADS + head)[:, None] * H + d[None, :]
    tl.store(x + place, rounded(values, x.dtype.element_ty), mask=has[:, None] & (d < H)[None, :])


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, window):
        out, row_lse = _packed_forward(q, k, v, plan, scale, window)
        ctx.save_for_backward(q, k, v, out, row_lse)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        dq, dk, dv = _packed_backward(*ctx.saved_tensors, grad, ctx.plan, ctx.scale, ctx.window)
        return dq, dk, dv, None, None, None
