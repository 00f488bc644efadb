"""Operands of the bfloat16 dot product: float32 rows rounded to bfloat16, in the layouts that it reads.

Rounding is to nearest even. The product takes pairs of k, so a reduction of odd length is filled up with a zero.
"""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.storage import PANEL


def rounded(x_TK: torch.Tensor) -> torch.Tensor:
    """x as bfloat16 [T, K or K + 1]."""
    num_rows, width = x_TK.shape
    y = torch.empty(num_rows, _even(width), dtype=torch.bfloat16)
    library().ls_round_rows(x_TK.data_ptr(), x_TK.stride(0), y.data_ptr(), y.stride(0), num_rows, width)
    return y


def rounded_transpose(x_TK: torch.Tensor) -> torch.Tensor:
    """x transposed as bfloat16 [K, T or T + 1]."""
    num_rows, width = x_TK.shape
    y = torch.empty(width, _even(num_rows), dtype=torch.bfloat16)
    library().ls_round_transposed(x_TK.data_ptr(), x_TK.stride(0), y.data_ptr(), y.stride(0), num_rows, width)
    return y


def packed_columns(x_TK: torch.Tensor) -> torch.Tensor:
    """bfloat16 x [T, K] packed as the weight [K, T] of a product that sums over T."""
    num_rows, width = x_TK.shape
    packed = torch.empty(-(-width // PANEL), _even(num_rows) // 2, PANEL, 2, dtype=torch.bfloat16)
    library().ls_pack_columns(x_TK.data_ptr(), x_TK.stride(0), packed.data_ptr(), num_rows, width)
    return packed


def _even(length: int) -> int:
    return length + length % 2
