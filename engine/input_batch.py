"""InputBatch: one step's plan as tensors, rows of all requests packed without padding."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from engine.sampling_batch import SamplingBatch
from engine.step_plan import SchedulerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """T rows of B requests, and who draws from them."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    block_tables: torch.Tensor  # [B, max_blocks] int32
    slot_mapping: torch.Tensor  # [T] int64
    sampling: SamplingBatch

    @classmethod
    def from_plan(cls, plan: SchedulerOutput, block_size: int) -> InputBatch:
        """Packs a non-empty plan."""
        input_ids: list[int] = []
        starts, lengths, cu_seqlens = [], [], [0]
        for item in plan.scheduled:
            end = item.start + item.num_tokens
            input_ids += item.request.token_ids[item.start : end]
            starts.append(item.start)
            lengths.append(end)
            cu_seqlens.append(len(input_ids))
        cu_seqlens_q, first = np.array(cu_seqlens, dtype=np.int64), np.array(starts, dtype=np.int64)
        sequence = np.repeat(np.arange(len(starts)), np.diff(cu_seqlens_q))
        positions = np.arange(len(input_ids)) + (first - cu_seqlens_q[:-1])[sequence]
        tables = _block_tables(plan)
        slots = tables[sequence, positions // block_size].astype(np.int64) * block_size + positions % block_size
        return cls(
            input_ids=torch.tensor(input_ids, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            cu_seqlens_q=torch.from_numpy(cu_seqlens_q.astype(np.int32)),
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=torch.from_numpy(tables),
            slot_mapping=torch.from_numpy(slots),
            sampling=SamplingBatch.from_plan(plan, cu_seqlens),
        )

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]


def _block_tables(plan: SchedulerOutput) -> np.ndarray:
    width = max(len(item.request.block_ids) for item in plan.scheduled)
    tables = np.zeros((len(plan.scheduled), width), dtype=np.int32)
    for row, item in zip(tables, plan.scheduled, strict=True):
        row[: len(item.request.block_ids)] = item.request.block_ids
    return tables
