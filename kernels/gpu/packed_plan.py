"""Where the rows of a packed training batch lie in blocks, and which tiles of rows see which, on the device."""

from __future__ import annotations

import torch

from kernels import attention as cpu_attention
from kernels.gpu.tiles import BACKWARD_TILE

Segments = list[tuple[int, int, int]]


class PackedPlan:
    """The plan of `kernels.attention.PackedPlan` as tensors on a device, with the work lists of the backward pass.

    segments: (first_row, end_row, parent) of each run of consecutive rows. Its keys are the rows of its parent (an
    index of an earlier segment, or -1), then its own, causally. The segments that share a parent follow it at once;
    ValueError otherwise.
    """

    def __init__(self, segments: Segments, device: torch.device | str, block_size: int = 16) -> None:
        layout = cpu_attention.PackedPlan(segments, block_size)
        self.device, self.block_size = torch.device(device), block_size
        self.num_blocks, self.num_rows = layout.num_blocks, layout.num_rows
        self.rows, self.slot_mapping = layout.rows.to(device), layout.slot_mapping.to(device)
        self.block_tables, self.cu_seqlens_q = layout.block_tables.to(device), layout.cu_seqlens_q.to(device)
        self.seq_lens = layout.seq_lens.to(device)
        self.positions = _int32(_positions(segments), 1, device).reshape(-1)  # [T]
        self.query_tiles = _int32(_query_tiles(segments), 5, device)  # first row, end, parent's rows, first own key
        self.key_tiles = _int32(_key_tiles(segments), 3, device)  # first row, end, end of the rows that see it
        self._scratch: dict[tuple[int, int, torch.dtype], tuple[torch.Tensor, torch.Tensor]] = {}

    def blocks(self, num_kv_heads: int, head_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value blocks to work in; one pair serves all layers in turn, since only the forward pass reads it."""
        key = (num_kv_heads, head_dim, dtype)
        if key not in self._scratch:
            shape = (self.num_blocks, num_kv_heads, self.block_size, head_dim)
            keys = torch.empty(shape, dtype=dtype, device=self.device)
            self._scratch[key] = (keys, torch.empty_like(keys))
        return self._scratch[key]


def _positions(segments: Segments) -> list[tuple[int]]:
    lengths = [_parent_rows(segments, parent)[1] - _parent_rows(segments, parent)[0] for _, _, parent in segments]
    return [(length + i,) for (first, end, _), length in zip(segments, lengths) for i in range(end - first)]


def _query_tiles(segments: Segments) -> list[tuple[int, ...]]:
    return [
        (at, min(at + BACKWARD_TILE, end), *_parent_rows(segments, parent), first)
        for first, end, parent in segments
        for at in range(first, end, BACKWARD_TILE)
    ]


def _key_tiles(segments: Segments) -> list[tuple[int, ...]]:
    """A parent's keys are seen by its own rows and its children's, which are the rows that follow."""
    tiles = []
    for index, (first, end, _) in enumerate(segments):
        seen_until = max([end, *(child_end for _, child_end, parent in segments if parent == index)])
        tiles += [(at, min(at + BACKWARD_TILE, end), seen_until) for at in range(first, end, BACKWARD_TILE)]
    return tiles


def _parent_rows(segments: Segments, parent: int) -> tuple[int, int]:
    return (segments[parent][0], segments[parent][1]) if parent >= 0 else (0, 0)


def _int32(rows: list[tuple[int, ...]], width: int, device: torch.device | str) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.int32).reshape(-1, width).to(device)
