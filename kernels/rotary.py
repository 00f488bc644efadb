"""Rotary position embedding in the half-split form of the Llama family (docs/numerics.md, "Rotary")."""

from __future__ import annotations

import decimal

import torch

from kernels.library import library
from kernels.linear import check_float32
from kernels.rope_scaling import RopeScaling

MAX_POSITIONS = 1 << 20


def rotary_table(num_positions: int, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """[num_positions, head_dim] float32: the cosines of the head_dim / 2 angles of a position, then their sines.

    The angle is float32(position * inv_freq), inv_freq float32; cosine and sine are taken in float64 and rounded once,
    then multiplied by the scaling's attention factor, where there is one.
    All of it is our own arithmetic: a mathematics library's last bit may differ between machines.
    """
    if num_positions > MAX_POSITIONS:
        raise ValueError(f"num_positions={num_positions} exceeds {MAX_POSITIONS}, to which the angles are exact")
    inv_freq = inverse_frequencies(head_dim, theta, scaling)
    table = inv_freq.new_empty(num_positions, head_dim)
    library().ls_rotary_table(inv_freq.data_ptr(), table.data_ptr(), num_positions, head_dim)
    if scaling is not None and scaling.attention_factor != 1.0:
        table *= scaling.attention_factor
    return table


def inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> torch.Tensor:
    """[head_dim / 2] float32: theta^(-2i / head_dim), worked out to 40 decimal digits first, or a scaling's own."""
    if scaling is not None:
        return torch.from_numpy(scaling.inverse_frequencies(head_dim, theta))
    with decimal.localcontext(decimal.Context(prec=40)):
        base, width = decimal.Decimal(theta), decimal.Decimal(head_dim)
        values = [float(base ** (-twice / width)) for twice in range(0, head_dim, 2)]
    return torch.tensor(values, dtype=torch.float32, device="cpu")


def rotary(x_TNH: torch.Tensor, positions_T: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turns the heads of x [T, N, H] by the angles of its position; int64 positions [T], table of `rotary_table`."""
    if torch.is_grad_enabled() and x_TNH.requires_grad:
        return _Rotary.apply(x_TNH, positions_T, table)
    return _rotary(x_TNH, positions_T, table, 1.0)


def _rotary(x, positions, table, sign):
    num_rows, num_heads, head_dim = x.shape
    check_float32(x, "x")
    if x.stride(2) != 1 or x.stride(1) != head_dim:
        x = x.contiguous()
    y = x.new_empty(num_rows, num_heads, head_dim)
    library().ls_rotary(
        x.data_ptr(), x.stride(0), positions.data_ptr(), table.data_ptr(), y.data_ptr(), num_rows, num_heads, head_dim,
        sign,
    )  # fmt: skip
    return y


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, positions, table):
        ctx.save_for_backward(positions, table)
        return _rotary(x, positions, table, 1.0)

    @staticmethod
    def backward(ctx, grad):
        positions, table = ctx.saved_tensors
        return _rotary(grad, positions, table, -1.0), None, None
