"""RMSNorm, alone and fused with the residual sum (docs/numerics.md, "GPU profile")."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import rounded
from kernels.gpu.launch import aligned, launch
from kernels.gpu.tiles import row_warps


def rms_norm(
    x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float, out_dtype: torch.dtype = torch.bfloat16
) -> torch.Tensor:
    """y[T, D] = x / sqrt(mean(x^2) + eps) * weight in float32, rounded once to out_dtype; weight float32."""
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad):
        return _RMSNorm.apply(x_TD, weight_D, eps, out_dtype)
    return _rms_norm(x_TD, None, weight_D, eps, out_dtype)[1]


def add_rms_norm(
    x_TD: torch.Tensor,
    delta_TD: torch.Tensor,
    weight_D: torch.Tensor,
    eps: float,
    out_dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, y) with s = x + delta in float32 and y = rms_norm(s): one pass over the residual stream."""
    if torch.is_grad_enabled() and (x_TD.requires_grad or delta_TD.requires_grad or weight_D.requires_grad):
        return _AddRMSNorm.apply(x_TD, delta_TD, weight_D, eps, out_dtype)
    return _rms_norm(x_TD, delta_TD, weight_D, eps, out_dtype)[:2]


def norm_gradients(
    x: torch.Tensor, scale: torch.Tensor, weight: torch.Tensor, grad: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients for x and weight of y = x r w with r = (mean(x^2) + eps)^-1/2 = scale, rows first, in float32."""
    grad, normed = grad.float(), x.float() * scale[:, None]
    weighted = grad * weight
    inner = (weighted * normed).mean(-1, keepdim=True)
    return (weighted - normed * inner) * scale[:, None], (grad * normed).sum(0)


def _rms_norm(x, delta, weight, eps, out_dtype):
    """(x + delta or None, its norm, the factor r of each row); r is always written, so that one kernel serves all."""
    num_rows, width = x.shape
    x, weight = aligned(x), aligned(weight)
    delta = None if delta is None else aligned(delta)
    y = x.new_empty(num_rows, width, dtype=out_dtype)
    total = None if delta is None else x.new_empty(num_rows, width, dtype=torch.float32)
    scale = x.new_empty(num_rows, dtype=torch.float32)
    launch(
        _rms_norm_kernel, (num_rows,), x, delta, weight, total, y, scale, eps,
        D=width, BLOCK=triton.next_power_of_2(width), num_warps=row_warps(width),
    )  # fmt: skip
    return total, y, scale


@triton.jit
def _rms_norm_kernel(x, delta, weight, total, y, scale, eps, D: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    has = i < D
    place = row * D + i
    values = tl.load(x + place, mask=has, other=0.0).to(tl.float32)
    if delta is not None:
        values += tl.load(delta + place, mask=has, other=0.0).to(tl.float32)
        tl.store(total + place, values, mask=has)
    mean = tl.math.div_rn(tl.sum(values * values, axis=0), tl.full((), D, tl.float32))
    r = tl.math.div_rn(tl.full((), 1.0, tl.float32), tl.math.sqrt_rn(mean + eps))
    tl.store(scale + row, r)
    normed = (values * r) * tl.load(weight + i, mask=has, other=0.0)
    tl.store(y + place, rounded(normed, y.dtype.element_ty), mask=has)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, out_dtype):
        _, y, scale = _rms_norm(x, None, weight, eps, out_dtype)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        x, scale, weight = ctx.saved_tensors
        grad_x, grad_weight = norm_gradients(x, scale, weight, grad)
        return grad_x.to(x.dtype), grad_weight, None, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps, out_dtype):
        total, y, scale = _rms_norm(x, delta, weight, eps, out_dtype)
        ctx.save_for_backward(total, scale, weight)
        ctx.dtypes = x.dtype, delta.dtype
        return total, y

    @staticmethod
    def backward(ctx, grad_total, grad):
        total, scale, weight = ctx.saved_tensors
        grad_x, grad_weight = norm_gradients(total, scale, weight, grad)
        grad_x = grad_x + grad_total
        return grad_x.to(ctx.dtypes[0]), grad_x.to(ctx.dtypes[1]), grad_weight, None, None
