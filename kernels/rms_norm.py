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


def head_norms(
    qk_TXH: torch.Tensor, q_weight_H: torch.Tensor, k_weight_H: torch.Tensor, num_heads: int, eps: float
) -> torch.Tensor:
    """RMSNorm of each head by itself: the first `num_heads` (queries) under one weight, the other (keys) under another.

    qk [T, N + K, H] may be strided over rows; the result is contiguous.
    """
    if torch.is_grad_enabled() and (qk_TXH.requires_grad or q_weight_H.requires_grad):
        return _HeadNorms.apply(qk_TXH, q_weight_H, k_weight_H, num_heads, eps)
    return _head_norms(qk_TXH, q_weight_H, k_weight_H, num_heads, eps, (None, None))


def _head_norms(x, q_weight, k_weight, num_heads, eps, scales):
    check_float32(x, "qk")
    x = x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
    y = x.new_empty(x.shape)
    for heads, weight, scale in zip(_query_and_key_heads(num_heads), (q_weight, k_weight), scales):
        part, out = x[:, heads], y[:, heads]
        library().ls_rms_norm(
            part.data_ptr(), part.stride(0), None, weight.data_ptr(), None, out.data_ptr(), out.stride(0),
            None if scale is None else scale.data_ptr(), part.shape[0], part.shape[1], part.shape[2], eps,
        )  # fmt: skip
    return y


def _query_and_key_heads(num_heads):
    return slice(0, num_heads), slice(num_heads, None)


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
        None if scale is None else scale.data_ptr(), num_rows, 1, width, eps,
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


class _HeadNorms(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, q_weight, k_weight, num_heads, eps):
        num_rows, num_all, _ = x.shape
        scales = x.new_empty(num_rows, num_heads), x.new_empty(num_rows, num_all - num_heads)
        ctx.save_for_backward(x, q_weight, k_weight, *scales)
        return _head_norms(x, q_weight, k_weight, num_heads, eps, scales)

    @staticmethod
    def backward(ctx, grad):
        x, *weights, q_scale, k_scale = ctx.saved_tensors
        grad_x, grad_weights = torch.empty_like(grad), []
        for heads, weight, scale in zip(_query_and_key_heads(q_scale.shape[1]), weights, (q_scale, k_scale)):
            flat_x, flat_grad = x[:, heads].flatten(0, 1), grad[:, heads].flatten(0, 1)
            part, grad_weight = _backward(flat_x, scale.flatten(), weight, flat_grad)
            grad_x[:, heads] = part.view_as(grad_x[:, heads])
            grad_weights.append(grad_weight)
        return grad_x, *grad_weights, None, None


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
