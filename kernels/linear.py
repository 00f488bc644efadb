"""Linear layers and embeddings over packed weights.

A weight [N, K] is packed as [ceil(N / 64), K, 64], so that lanes run over outputs and the sum over k has one fixed
order (docs/numerics.md, "Linear"). Several Hugging Face tensors may be rows of one packed weight (q, k and v; gate and
up).
"""

from __future__ import annotations

import torch

from kernels.library import library

PANEL = 64


def packed_shape(num_rows: int, width: int) -> tuple[int, int, int]:
    """Shape of the packed storage of a weight [num_rows, width]."""
    return (num_rows + PANEL - 1) // PANEL, width, PANEL


def pack_rows(packed: torch.Tensor, rows_NK: torch.Tensor, first_row: int = 0) -> None:
    """Writes float32 rows [n, K] into rows [first_row, first_row + n) of packed storage, in place."""
    num_rows, width = rows_NK.shape
    _check_rows(packed, first_row, num_rows, width)
    rows_NK = rows_NK.detach().contiguous()
    check_float32(rows_NK, "rows")
    library().ls_pack_rows(packed.data_ptr(), rows_NK.data_ptr(), first_row, num_rows, width)


def unpack_rows(packed: torch.Tensor, first_row: int, num_rows: int) -> torch.Tensor:
    """Rows [first_row, first_row + num_rows) of packed storage as a new float32 tensor [num_rows, K]."""
    width = packed.shape[1]
    _check_rows(packed, first_row, num_rows, width)
    rows = packed.new_empty(num_rows, width)
    library().ls_unpack_rows(packed.data_ptr(), rows.data_ptr(), first_row, num_rows, width)
    return rows


def linear(
    x_TK: torch.Tensor,
    packed: torch.Tensor,
    num_outputs: int,
    bias: torch.Tensor | None = None,
    master: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[T, N] = x[T, K] @ weight[N, K].T + bias[N] from packed storage.

    `master`, the same weight as a float32 tensor [N, K], serves the backward pass: gradients flow to it (and to x and
    bias). The caller keeps `packed` equal to it.
    """
    if torch.is_grad_enabled() and (x_TK.requires_grad or (master is not None and master.requires_grad)):
        if master is None:
            raise ValueError("x requires a gradient, which packed storage cannot give: pass master, the weight [N, K]")
        return _Linear.apply(x_TK, packed, num_outputs, bias, master)
    return _linear(x_TK, packed, num_outputs, bias)


def embedding(ids_T: torch.Tensor, packed: torch.Tensor, master: torch.Tensor | None = None) -> torch.Tensor:
    """x[T, K] = weight[ids] from packed storage; ids int64 in [0, N), checked by the caller."""
    if torch.is_grad_enabled() and master is not None and master.requires_grad:
        return _Embedding.apply(ids_T, packed, master)
    return _embedding(ids_T, packed)


def _linear(x: torch.Tensor, packed: torch.Tensor, num_outputs: int, bias: torch.Tensor | None) -> torch.Tensor:
    num_rows, width = x.shape
    if x.stride(1) != 1:
        x = x.contiguous()
    check_float32(x, "x")
    if packed.shape[1] != width:
        raise ValueError(f"x has {width} columns but the weight has {packed.shape[1]}")
    y = x.new_empty(num_rows, num_outputs)
    library().ls_linear(
        x.data_ptr(), x.stride(0), packed.data_ptr(), None if bias is None else bias.data_ptr(),
        y.data_ptr(), num_outputs, num_rows, num_outputs, width,
    )  # fmt: skip
    return y


def _embedding(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    check_float32(packed, "packed")
    out = packed.new_empty(ids.shape[0], packed.shape[1])
    library().ls_embedding(packed.data_ptr(), ids.data_ptr(), out.data_ptr(), ids.shape[0], packed.shape[1])
    return out


class _Linear(torch.autograd.Function):
    """The backward products are torch's: they need be repeatable, not batch-invariant."""

    @staticmethod
    def forward(ctx, x, packed, num_outputs, bias, master):
        ctx.save_for_backward(x, master)
        ctx.has_bias = bias is not None
        return _linear(x, packed, num_outputs, bias)

    @staticmethod
    def backward(ctx, grad):
        x, master = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_master = ctx.needs_input_grad
        grad_x = grad @ master if needs_x else None
        grad_bias = grad.sum(0) if ctx.has_bias and needs_bias else None
        grad_master = grad.T @ x if needs_master else None
        return grad_x, None, None, grad_bias, grad_master


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, packed, master):
        ctx.save_for_backward(ids)
        ctx.shape = master.shape
        return _embedding(ids, packed)

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        return None, None, grad.new_zeros(ctx.shape).index_add_(0, ids, grad)


def check_float32(x: torch.Tensor, name: str) -> None:
    """Raises ValueError for a tensor that the C kernels would read as something it is not."""
    if x.dtype is not torch.float32 or x.device.type != "cpu":
        raise ValueError(f"{name} is {x.dtype} on {x.device}: the C kernels take float32 on the CPU")


def _check_rows(packed: torch.Tensor, first_row: int, num_rows: int, width: int) -> None:
    check_float32(packed, "packed")
    if not packed.is_contiguous() or packed.shape[2] != PANEL or packed.shape[1] != width:
        raise ValueError(f"packed storage of shape {tuple(packed.shape)} does not hold rows of width {width}")
    if first_row < 0 or first_row + num_rows > packed.shape[0] * PANEL:
        available = packed.shape[0] * PANEL
        raise ValueError(f"rows {first_row}..{first_row + num_rows} exceed the {available} rows of the storage")
