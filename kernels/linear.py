"""Linear layers and embeddings over packed weights.

A weight [N, K] is packed as [ceil(N / 64), K, 64] float32 or [ceil(N / 64), K / 2, 64, 2] bfloat16, so that lanes run
over outputs and the sum over k has one fixed order (docs/numerics.md, "Linear"). Several Hugging Face tensors may be
rows of one packed weight (q, k and v; gate and up).
"""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.operands import packed_columns, rounded, rounded_transpose
from kernels.storage import PANEL

FLOAT32, BFLOAT16, BFLOAT16_DOT = 0, 1, 2  # ls_arithmetic in csrc/panel.h


def packed_shape(num_rows: int, width: int, dtype: torch.dtype = torch.float32) -> tuple[int, ...]:
    """Shape of the packed storage of a weight [num_rows, width], float32 or bfloat16.

    Raises ValueError for an odd width in bfloat16, which is stored in pairs.
    """
    num_panels = (num_rows + PANEL - 1) // PANEL
    if dtype is torch.float32:
        return num_panels, width, PANEL
    if width % 2:
        raise ValueError(f"a weight of width {width} cannot be bfloat16: pairs of its columns are stored together")
    return num_panels, width // 2, PANEL, 2


def pack_rows(packed: torch.Tensor, rows_NK: torch.Tensor, first_row: int = 0) -> None:
    """Writes float32 rows [n, K] into rows [first_row, first_row + n) of packed storage, rounded to its type."""
    num_rows, width = rows_NK.shape
    _check_rows(packed, first_row, num_rows, width)
    rows_NK = rows_NK.detach().contiguous()
    check_float32(rows_NK, "rows")
    library().ls_pack_rows(packed.data_ptr(), _kind(packed), rows_NK.data_ptr(), first_row, num_rows, width)


def unpack_rows(packed: torch.Tensor, first_row: int, num_rows: int) -> torch.Tensor:
    """Rows [first_row, first_row + num_rows) of packed storage as a new float32 tensor [num_rows, K]."""
    width = packed_width(packed)
    _check_rows(packed, first_row, num_rows, width)
    rows = torch.empty(num_rows, width, dtype=torch.float32)
    library().ls_unpack_rows(packed.data_ptr(), _kind(packed), rows.data_ptr(), first_row, num_rows, width)
    return rows


def packed_width(packed: torch.Tensor) -> int:
    """K of a packed weight [N, K]."""
    return packed.shape[1] * (1 if packed.dtype is torch.float32 else 2)


def linear(
    x_TK: torch.Tensor,
    packed: torch.Tensor,
    num_outputs: int,
    bias: torch.Tensor | None = None,
    master: torch.Tensor | None = None,
    is_dot: bool = False,
) -> torch.Tensor:
    """y[T, N] = x[T, K] @ weight[N, K].T + bias[N] from packed storage, float32.

    `master`, the same weight as a float32 tensor [N, K], serves the backward pass: gradients flow to it (and to x and
    bias). The caller keeps `packed` equal to it, rounded where packed is bfloat16. `is_dot` rounds x to bfloat16 too
    and sums by the bfloat16 dot product.
    """
    if torch.is_grad_enabled() and (x_TK.requires_grad or (master is not None and master.requires_grad)):
        if master is None:
            raise ValueError("x requires a gradient, which packed storage cannot give: pass master, the weight [N, K]")
        return _Linear.apply(x_TK, packed, num_outputs, bias, master, is_dot)
    return product(operand(x_TK, packed, is_dot), packed, num_outputs, bias)


def embedding(ids_T: torch.Tensor, packed: torch.Tensor, master: torch.Tensor | None = None) -> torch.Tensor:
    """x[T, K] = weight[ids] from packed storage, float32; ids int64 in [0, N), checked by the caller."""
    if torch.is_grad_enabled() and master is not None and master.requires_grad:
        return _Embedding.apply(ids_T, packed, master)
    return _embedding(ids_T, packed)


def operand(x_TK: torch.Tensor, packed: torch.Tensor, is_dot: bool, name: str = "x") -> torch.Tensor:
    """x as the product reads it: rows adjacent, float32 or, for the dot product, rounded to bfloat16.

    Raises ValueError, which calls x by `name`, for another type or width, or a dot product with a float32 weight.
    """
    check_float32(x_TK, name)
    if packed_width(packed) != x_TK.shape[1]:
        raise ValueError(f"{name} has {x_TK.shape[1]} columns but the weight has {packed_width(packed)}")
    x_TK = x_TK if x_TK.stride(1) == 1 else x_TK.contiguous()
    if not is_dot:
        return x_TK
    if packed.dtype is not torch.bfloat16:
        raise ValueError(f"the weight is {packed.dtype}: a bfloat16 dot product takes bfloat16 weights")
    return rounded(x_TK)


def arithmetic(x_TK: torch.Tensor, packed: torch.Tensor) -> int:
    """How an operand and a weight are multiplied, as the C kernels number it."""
    return BFLOAT16_DOT if x_TK.dtype is torch.bfloat16 else _kind(packed)


def product(
    x_TK: torch.Tensor, packed: torch.Tensor, num_outputs: int, addend: torch.Tensor | None = None
) -> torch.Tensor:
    """y[T, N] = x @ weight.T + addend of an `operand` x; addend is [N] or [T, N]."""
    num_rows = x_TK.shape[0]
    y = x_TK.new_empty(num_rows, num_outputs, dtype=torch.float32)
    multiply(x_TK, packed, addend, y)
    return y


def multiply(x: torch.Tensor, packed: torch.Tensor, addend: torch.Tensor | None, y: torch.Tensor) -> None:
    """y[T, N] = x @ weight.T + addend, in place; addend may be y itself."""
    addend_stride = 0 if addend is None or addend.dim() == 1 else addend.stride(0)
    library().ls_linear(
        x.data_ptr(), x.stride(0), packed.data_ptr(), arithmetic(x, packed),
        None if addend is None else addend.data_ptr(), addend_stride, y.data_ptr(), y.stride(0), y.shape[0],
        y.shape[1], packed_width(packed),
    )  # fmt: skip


def _embedding(ids: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
    width = packed_width(packed)
    out = packed.new_empty(ids.shape[0], width, dtype=torch.float32)
    library().ls_embedding(packed.data_ptr(), _kind(packed), ids.data_ptr(), out.data_ptr(), ids.shape[0], width)
    return out


class _Linear(torch.autograd.Function):
    """The backward products are torch's, or ours where the dot product is: repeatable, not batch-invariant."""

    @staticmethod
    def forward(ctx, x, packed, num_outputs, bias, master, is_dot):
        x = operand(x, packed, is_dot)
        ctx.save_for_backward(x, master)
        ctx.has_bias, ctx.is_rounded = bias is not None, packed.dtype is torch.bfloat16
        return product(x, packed, num_outputs, bias)

    @staticmethod
    def backward(ctx, grad):
        x, master = ctx.saved_tensors
        needs_x, _, _, needs_bias, needs_master, _ = ctx.needs_input_grad
        grad_bias = grad.sum(0) if ctx.has_bias and needs_bias else None
        if x.dtype is torch.bfloat16:
            grad_x, grad_master = dot_gradients(grad.contiguous(), x, master, needs_x, needs_master)
        else:
            weight = master.bfloat16().float() if ctx.is_rounded and needs_x else master
            grad_x = grad @ weight if needs_x else None
            grad_master = grad.T @ x if needs_master else None
        return grad_x, None, None, grad_bias, grad_master, None


def dot_gradients(
    grad_TN: torch.Tensor, x_TK: torch.Tensor, master_NK: torch.Tensor, needs_x: bool, needs_master: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(grad @ weight [T, K], grad.T @ x [N, K]) by the dot product: grad, x and weight as bfloat16, sums in float32."""
    width = master_NK.shape[1]
    grad_x = product(rounded(grad_TN), packed_columns(master_NK.bfloat16()), width) if needs_x else None
    grad_master = product(rounded_transpose(grad_TN), packed_columns(x_TK), width) if needs_master else None
    return grad_x, grad_master


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


def _kind(packed: torch.Tensor) -> int:
    """How the C kernels number the type of packed storage."""
    if packed.device.type != "cpu" or packed.dtype not in (torch.float32, torch.bfloat16):
        raise ValueError(f"packed is {packed.dtype} on {packed.device}: float32 or bfloat16 on the CPU is needed")
    return FLOAT32 if packed.dtype is torch.float32 else BFLOAT16


def _check_rows(packed: torch.Tensor, first_row: int, num_rows: int, width: int) -> None:
    if not packed.is_contiguous() or tuple(packed.shape) != packed_shape(packed.shape[0] * PANEL, width, packed.dtype):
        raise ValueError(f"packed storage of shape {tuple(packed.shape)} does not hold rows of width {width}")
    if first_row < 0 or first_row + num_rows > packed.shape[0] * PANEL:
        available = packed.shape[0] * PANEL
        raise ValueError(f"rows {first_row}..{first_row + num_rows} exceed the {available} rows of the storage")
