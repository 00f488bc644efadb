"""RMSNorm, alone and fused with the residual sum (docs/numerics.md, "RMSNorm")."""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.linear import check_float32


def rms_norm(x_TD: torch.Tensor, weight_D: torch.Tensor, eps: float) -> torch.Tensor:
    """y[T, D] = x / sqrt(mean(x^2) + eps) * weight, row by row."""
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_D.requires_grad):
        return _RMSNorm.apply(x_TD, weight_D, eps)
    return _rms_norm(x_TD, None, weight_D, eps, keep_scale=False)[1]


def add_rms_norm(
    x_TD: torch.Tensor, delta_TD: torch.Tensor, weight_D: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(s, y) with s = x + delta, rounded, and y = rms_norm(s): one pass over the residual stream."""
    if torch.is_grad_enabled() and (x_TD.requires_grad or delta_TD.requires_grad or weight_D.requires_grad):
        return _AddRMSNorm.apply(x_TD, delta_TD, weight_D, eps)
    return _rms_norm(x_TD, delta_TD, weight_D, eps, keep_scale=False)[:2]


def _rms_norm(x, delta, weight, eps, keep_scale):
    num_rows, width = x.shape
    check_float32(x, "x")
    if x.stride(1) != 1:
        x = x.contiguous()
    if delta is not None:
        check_float32(delta, "delta")
        delta = delta.contiguous()
    y = x.new_empty(num_rows, width)
    total = None if delta is None else x.new_empty(num_rows, width)
    scale = x.new_empty(num_rows) if keep_scale else None
    library().ls_rms_norm(
        x.data_ptr(), x.stride(0), None if delta is None else delta.data_ptr(), weight.data_ptr(),
        None if total is None else total.data_ptr(), y.data_ptr(), width,
        None if scale is None else scale.data_ptr(), num_rows, width, eps,
    )  # fmt: skip
    return total, y, scale


def _backward(x, scale, weight, grad):
    """Gradients of y = x r w with r = (mean(x^2) + eps)^-1/2."""
    normed = x * scale[:, None]
    weighted = grad * weight
    inner = (weighted * normed).mean(-1, keepdim=True)
    return (weighted - normed * inner) * scale[:, None], (grad * normed).sum(0)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        _, y, scale = _rms_norm(x, None, weight, eps, keep_scale=True)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    def backward(ctx, grad):
        grad_x, grad_weight = _backward(*ctx.saved_tensors, grad)
        return grad_x, grad_weight, None


class _AddRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight, eps):
        total, y, scale = _rms_norm(x, delta, weight, eps, keep_scale=True)
        ctx.save_for_backward(total, scale, weight)
        return total, y

    @staticmethod
    def backward(ctx, grad_total, grad):
        grad_x, grad_weight = _backward(*ctx.saved_tensors, grad)
        grad_x = grad_x + grad_total
        return grad_x, grad_x, grad_weight, None
