"""Linear layers and embeddings over row-major weights [N, K] (docs/numerics.md, "GPU profile").

A product is one chain over k, ascending, in float32: no splits of K, one tensor-core instruction for every number of
rows. Programs are persistent; which tiles a program takes shows in no result.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl

from kernels.gpu.arithmetic import rounded, tile_product
from kernels.gpu.launch import aligned, launch
from kernels.gpu.tiles import ROW_GROUP, MatmulTile, matmul_tile

DTYPES = (torch.bfloat16, torch.float32)


def linear(
    x_TK: torch.Tensor,
    weight_NK: torch.Tensor,
    bias: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    master: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[T, N] = x[T, K] @ weight[N, K].T + bias[N], summed in float32 and rounded once to out_dtype (default: x's).

    x and weight are bfloat16 or float32, both alike; bias is float32. `master`, the same weight in float32, takes the
    gradient in the backward pass.
    """
    out_dtype = x_TK.dtype if out_dtype is None else out_dtype
    if torch.is_grad_enabled() and (x_TK.requires_grad or (master is not None and master.requires_grad)):
        return _Linear.apply(x_TK, weight_NK, bias, out_dtype, master)
    return _linear(x_TK, weight_NK, bias, out_dtype)


def embedding(ids_T: torch.Tensor, weight_NK: torch.Tensor, master: torch.Tensor | None = None) -> torch.Tensor:
    """x[T, K] = weight[ids] in float32, where the residual stream begins; ids int64 in [0, N)."""
    if torch.is_grad_enabled() and master is not None and master.requires_grad:
        return _Embedding.apply(ids_T, weight_NK, master)
    return weight_NK.index_select(0, ids_T).float()


def check_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError for operands that the matrix product does not take."""
    if x.dtype is not weight.dtype or x.dtype not in DTYPES:
        raise ValueError(f"x is {x.dtype} and the weight {weight.dtype}: both must be bfloat16, or both float32")
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x has {x.shape[1]} columns but the weight has {weight.shape[1]}")


def matmul_float32(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a @ b in float32 by torch, for the backward passes: repeatable, not batch-invariant."""
    if a.is_cuda and a.dtype is not torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def tiled_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out_dtype: torch.dtype, tile: MatmulTile
) -> torch.Tensor:
    """`linear` by a given tile; which one must not show in the result."""
    num_rows, width = x.shape
    num_outputs = weight.shape[0]
    x, weight = aligned(x), aligned(weight)
    y = x.new_empty(num_rows, num_outputs, dtype=out_dtype)
    num_tiles = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_outputs, tile.columns)
    num_programs = min(num_tiles, tile.programs_per_processor * _num_processors(x.device))
    launch(
        _linear_kernel, (num_programs,), x, weight, bias, y, num_rows,
        N=num_outputs, K=width, BLOCK_M=tile.rows, BLOCK_N=tile.columns, BLOCK_K=tile.depth, GROUP=ROW_GROUP,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return y


def _linear(x, weight, bias, out_dtype):
    check_operands(x, weight)
    return tiled_linear(x, weight, bias, out_dtype, matmul_tile(x.shape[0], weight.shape[0], x.dtype))


@functools.cache
def _num_processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@triton.jit(do_not_specialize=["num_rows"])
def _linear_kernel(
    x, weight, bias, y, num_rows,
    N: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    num_row_tiles = tl.cdiv(num_rows, BLOCK_M)
    num_column_tiles: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    for tile in tl.range(tl.program_id(0), num_row_tiles * num_column_tiles, tl.num_programs(0)):
        row_tile, column_tile = _tile_place(tile, num_row_tiles, num_column_tiles, GROUP)
        rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        has_row, has_column = rows < num_rows, columns < N
        wide_rows = rows.to(tl.int64)
        sums = tile_product(
            x + wide_rows * K, has_row, weight + columns.to(tl.int64) * K, has_column, K, BLOCK_M, BLOCK_N, BLOCK_K
        )
        if bias is not None:
            sums += tl.load(bias + columns, mask=has_column, other=0.0)[None, :]
        place = y + wide_rows[:, None] * N + columns[None, :]
        tl.store(place, rounded(sums, y.dtype.element_ty), mask=has_row[:, None] & has_column[None, :])


@triton.jit
def _tile_place(tile, num_row_tiles, num_column_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles pass over all columns together, one column after the other."""
    group = tile // (GROUP * num_column_tiles)
    first_row = group * GROUP
    height = tl.minimum(num_row_tiles - first_row, GROUP)
    within = tile - first_row * num_column_tiles
    return first_row + within % height, within // height


class _Linear(torch.autograd.Function):
    """The backward products are torch's: they need be repeatable, not batch-invariant."""

    @staticmethod
    def forward(ctx, x, weight, bias, out_dtype, master):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        return _linear(x, weight, bias, out_dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        needs_x, _, needs_bias, _, needs_master = ctx.needs_input_grad
        rounded = grad.to(weight.dtype)
        grad_x = rounded @ weight if needs_x else None
        grad_bias = grad.float().sum(0) if ctx.has_bias and needs_bias else None
        grad_master = matmul_float32(rounded.T, x) if needs_master else None
        return grad_x, None, grad_bias, None, grad_master


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, master):
        ctx.save_for_backward(ids)
        ctx.num_rows = master.shape[0]
        return weight.index_select(0, ids).float()

    @staticmethod
    def backward(ctx, grad):
        (ids,) = ctx.saved_tensors
        # It sorts the ids, where index_add_ would let the rows of equal ids race on CUDA.
        return None, None, torch.ops.aten.embedding_dense_backward(grad.contiguous(), ids, ctx.num_rows, -1, False)
