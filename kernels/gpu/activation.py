"""The gated activation of the Llama family (docs/numerics.md, "GPU profile")."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import exp, rounded
from kernels.gpu.launch import aligned, launch

BLOCK = 1024


def silu_and_mul(x_T2F: torch.Tensor) -> torch.Tensor:
    """y[T, F] = silu(x[:, :F]) * x[:, F:] in float32, rounded once to x's type."""
    if torch.is_grad_enabled() and x_T2F.requires_grad:
        return _SiluAndMul.apply(x_T2F)
    return _silu_and_mul(x_T2F)


def _silu_and_mul(x):
    x = aligned(x)
    num_rows, width = x.shape[0], x.shape[1] // 2
    y = x.new_empty(num_rows, width)
    launch(_silu_and_mul_kernel, (num_rows, triton.cdiv(width, BLOCK)), x, y, F=width, BLOCK=BLOCK, num_warps=4)
    return y


@triton.jit
def _silu_and_mul_kernel(x, y, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, sigmoid = _gate_and_up(x + row * (2 * F), i, F)
    silu = gate * sigmoid
    tl.store(y + row * F + i, rounded(silu * up, y.dtype.element_ty), mask=i < F)


@triton.jit
def _silu_and_mul_backward_kernel(x, grad, grad_x, F: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate, up, sigmoid = _gate_and_up(x + row * (2 * F), i, F)
    g = tl.load(grad + row * F + i, mask=i < F, other=0.0).to(tl.float32)
    silu = gate * sigmoid
    slope = sigmoid + silu * (1.0 - sigmoid)
    place = grad_x + row * (2 * F) + i
    tl.store(place, rounded(g * up * slope, grad_x.dtype.element_ty), mask=i < F)
    tl.store(place + F, rounded(g * silu, grad_x.dtype.element_ty), mask=i < F)


@triton.jit
def _gate_and_up(row, i, F: tl.constexpr):
    """(gate, up, sigmoid(gate)) in float32."""
    gate = tl.load(row + i, mask=i < F, other=0.0).to(tl.float32)
    up = tl.load(row + F + i, mask=i < F, other=0.0).to(tl.float32)
    return gate, up, tl.math.div_rn(tl.full(gate.shape, 1.0, tl.float32), 1.0 + exp(0.0 - gate))


class _SiluAndMul(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return _silu_and_mul(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        x, grad = aligned(x), aligned(grad)
        num_rows, width = grad.shape
        grad_x = torch.empty_like(x)
        launch(
            _silu_and_mul_backward_kernel, (num_rows, triton.cdiv(width, BLOCK)), x, grad, grad_x,
            F=width, BLOCK=BLOCK, num_warps=4,
        )  # fmt: skip
        return grad_x
