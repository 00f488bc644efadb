"""The gated activation of the Llama family (docs/numerics.md, "silu-and-mul")."""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.linear import check_float32


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """y[T, F] = silu(x[:, :F]) * x[:, F:] for contiguous float32 x [T, 2F]."""
    if torch.is_grad_enabled() and x_T2F.requires_grad:
        return _SiluAndMul.apply(x_T2F)
    return _silu_and_mul(x_T2F)


def _silu_and_mul(x):
    check_float32(x, "x")
    x = x.contiguous()
    y = x.new_empty(x.shape[0], x.shape[1] // 2)
    library().ls_silu_and_mul(x.data_ptr(), y.data_ptr(), y.shape[0], y.shape[1])
    return y


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _silu_and_mul(x)

    @staticmethod
    def backward(ctx, grad):
        x = ctx.saved_tensors[0].contiguous()
        grad = grad.contiguous()
        grad_x = torch.empty_like(x)
        library().ls_silu_and_mul_backward(
            x.data_ptr(), grad.data_ptr(), grad_x.data_ptr(), grad.shape[0], grad.shape[1]
        )
        return grad_x
