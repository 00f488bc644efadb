"""Attention metadata: what the model is told about the rows of a step (paged) or a training batch (packed).

The model calls `attention(layer, q, k, v, window)` and does not know which of the two it has. Both end in the same
kernel of the device, which visits keys at fixed absolute positions, so a row's result is the same bits in either.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from engine.ops import Ops

if TYPE_CHECKING:
    from engine.model_config import ModelConfig


class Attention(Protocol):
    """What `Transformer.forward` needs: stores or uses k and v of a layer and returns the attended values [T, N, H].

    `window` > 0 limits how many keys a row sees, itself included.
    """

    def __call__(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, window: int
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class PagedAttention:
    """The engine's metadata: keys and values live in the blocks of the KV pool."""

    ops: Ops
    key_blocks: torch.Tensor  # [L, P, ...] as `Ops.new_blocks` lays them out, float32 or bfloat16
    value_blocks: torch.Tensor  # likewise
    block_tables: torch.Tensor  # [B, max_blocks] int32
    cu_seqlens_q: torch.Tensor  # [B + 1] int32, first row of each request
    seq_lens: torch.Tensor  # [B] int32, positions of each request with this step's rows
    slot_mapping: torch.Tensor  # [T] int64, block * S + slot where each row's key and value go
    scale: float

    def __call__(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, window: int
    ) -> torch.Tensor:
        keys, values = self.key_blocks[layer], self.value_blocks[layer]
        self.ops.kv_store(k_TKH, v_TKH, keys, values, self.slot_mapping)
        tables, starts, lengths = self.block_tables, self.cu_seqlens_q, self.seq_lens
        return self.ops.paged_attention(q_TNH, keys, values, tables, starts, lengths, self.scale, window)


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Consecutive rows of a packed batch; their keys are the rows of `parent`, then their own, causally."""

    start_row: int
    end_row: int
    parent: int | None = None  # index of an earlier segment: the prompt that these rows continue


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAttention:
    """The trainer's metadata: sequences of a packed batch, some of which may share a prompt. Differentiable."""

    ops: Ops
    plan: Any  # of `Ops.packed_plan`
    scale: float

    @classmethod
    def from_segments(cls, config: ModelConfig, segments: Sequence[Segment], ops: Ops) -> PackedAttention:
        """Lays out a packed batch whose rows are covered by `segments` in order, children right after their parent.

        ops: the model's, which round keys and values to the type of the engine's blocks.

        Raises ValueError where the segments leave a gap or a parent does not directly precede its children.
        """
        runs = [(s.start_row, s.end_row, -1 if s.parent is None else s.parent) for s in segments]
        return cls(ops=ops, plan=ops.packed_plan(runs), scale=config.head_dim**-0.5)

    def __call__(
        self, layer: int, q_TNH: torch.Tensor, k_TKH: torch.Tensor, v_TKH: torch.Tensor, window: int
    ) -> torch.Tensor:
        return self.ops.packed_attention(q_TNH, k_TKH, v_TKH, self.plan, self.scale, window)
