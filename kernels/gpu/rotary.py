"""Rotary position embedding, with the norm of query and key heads where the family has it (docs/numerics.md)."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import rounded
from kernels.gpu.launch import aligned_rows, launch
from kernels.gpu.rms_norm import norm_gradients

HEADS_PER_PROGRAM = 8


def rotary(x_TXH: torch.Tensor, positions_T: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the heads of x [T, X, H] by the angles of its position, in float32, rounded once to x's type.

    positions int64 [T]; table float32 [positions, H] of `kernels.rotary.rotary_table`. x may be strided over rows.
    """
    if torch.is_grad_enabled() and x_TXH.requires_grad:
        return _Rotary.apply(x_TXH, positions_T, table)
    return _rotary(x_TXH, positions_T, table, 1.0)


def norm_and_rotary(
    x_TXH: torch.Tensor,
    positions_T: torch.Tensor,
    table: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    num_heads: int,
    eps: float,
) -> torch.Tensor:
    """RMSNorm of each head, then `rotary`, with no rounding between; heads from `num_heads` on are keys."""
    if torch.is_grad_enabled() and (x_TXH.requires_grad or q_weight.requires_grad or k_weight.requires_grad):
        return _NormAndRotary.apply(x_TXH, positions_T, table, q_weight, k_weight, num_heads, eps)
    return _rotary(x_TXH, positions_T, table, 1.0, q_weight, k_weight, num_heads, eps)


def _rotary(x, positions, table, sign, q_weight=None, k_weight=None, num_heads=0, eps=0.0, out_dtype=None):
    num_rows, num_vectors, head_dim = x.shape
    x = aligned_rows(x)
    y = x.new_empty(num_rows, num_vectors, head_dim, dtype=x.dtype if out_dtype is None else out_dtype)
    launch(
        _rotary_kernel, (num_rows, triton.cdiv(num_vectors, HEADS_PER_PROGRAM)),
        x, positions, table, q_weight, k_weight, y, sign, eps,
        X=num_vectors, N=num_heads, H=head_dim, X_STRIDE=x.stride(0),
        HEADS=HEADS_PER_PROGRAM, BLOCK=triton.next_power_of_2(head_dim // 2), num_warps=4,
    )  # fmt: skip
    return y


@triton.jit
def _rotary_kernel(
    x, positions, table, q_weight, k_weight, y, sign, eps,
    X: tl.constexpr, N: tl.constexpr, H: tl.constexpr, X_STRIDE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    half: tl.constexpr = H // 2
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    has = (heads < X)[:, None] & (i < half)[None, :]
    offsets = heads[:, None] * H + i[None, :]
    x1 = tl.load(x + row * X_STRIDE + offsets, mask=has, other=0.0).to(tl.float32)
    x2 = tl.load(x + row * X_STRIDE + half + offsets, mask=has, other=0.0).to(tl.float32)
    if q_weight is not None:
        mean = tl.math.div_rn(tl.sum(x1 * x1 + x2 * x2, axis=1), tl.full((HEADS,), H, tl.float32))
        r = tl.math.div_rn(tl.full((HEADS,), 1.0, tl.float32), tl.math.sqrt_rn(mean + eps))
        is_query = (heads < N)[:, None]
        x1 = (x1 * r[:, None]) * _head_weight(q_weight, k_weight, i, i < half, is_query)
        x2 = (x2 * r[:, None]) * _head_weight(q_weight + half, k_weight + half, i, i < half, is_query)
    angles = table + tl.load(positions + row) * H + i
    cosine = tl.load(angles, mask=i < half, other=0.0)[None, :]
    sine = (tl.load(angles + half, mask=i < half, other=0.0) * sign)[None, :]
    place = y + row * (X * H) + offsets
    tl.store(place, rounded(tl.fma(x1, cosine, -(x2 * sine)), y.dtype.element_ty), mask=has)
    tl.store(place + half, rounded(tl.fma(x2, cosine, x1 * sine), y.dtype.element_ty), mask=has)


@triton.jit
def _head_weight(q_weight, k_weight, i, has, is_query):
    q, k = tl.load(q_weight + i, mask=has, other=0.0), tl.load(k_weight + i, mask=has, other=0.0)
    return tl.where(is_query, q[None, :], k[None, :])


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, table):
        ctx.save_for_backward(positions, table)
        return _rotary(x, positions, table, 1.0)

    @staticmethod
    def backward(ctx, grad):
        positions, table = ctx.saved_tensors
        return _rotary(grad, positions, table, -1.0), None, None


class _NormAndRotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, table, q_weight, k_weight, num_heads, eps):
        ctx.save_for_backward(x, positions, table, q_weight, k_weight)
        ctx.num_heads, ctx.eps = num_heads, eps
        return _rotary(x, positions, table, 1.0, q_weight, k_weight, num_heads, eps)

    @staticmethod
    def backward(ctx, grad):
        x, positions, table, q_weight, k_weight = ctx.saved_tensors
        turned = _rotary(grad, positions, table, -1.0, out_dtype=torch.float32)
        grad_q, grad_q_weight = _norm_backward(x[:, : ctx.num_heads], turned[:, : ctx.num_heads], q_weight, ctx.eps)
        grad_k, grad_k_weight = _norm_backward(x[:, ctx.num_heads :], turned[:, ctx.num_heads :], k_weight, ctx.eps)
        grad_x = torch.cat([grad_q, grad_k], dim=1).to(x.dtype)
        return grad_x, None, None, grad_q_weight, grad_k_weight, None, None


def _norm_backward(x, grad, weight, eps):
    rows = x.reshape(-1, x.shape[2]).float()
    scale = (rows.square().mean(-1) + eps).rsqrt()
    grad_rows, grad_weight = norm_gradients(rows, scale, weight, grad.reshape(rows.shape))
    return grad_rows.view(x.shape), grad_weight
