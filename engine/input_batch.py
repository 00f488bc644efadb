"""InputBatch: one step's plan as tensors, rows of all requests packed without padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.prompt_logprobs import PromptRows, prompt_rows
from engine.sampling_batch import SamplingBatch
from engine.step_plan import ScheduledRequest, SchedulerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class InputBatch:
    """T rows of B requests. Views of the buffers that `InputBuffers` owns: good until it packs the next plan."""

    input_ids: torch.Tensor  # [T] int64
    positions: torch.Tensor  # [T] int64
    cu_seqlens_q: torch.Tensor  # [B + 1] int32
    seq_lens: torch.Tensor  # [B] int32
    block_tables: torch.Tensor  # [B, max_blocks] int32
    slot_mapping: torch.Tensor  # [T] int64
    sampling: SamplingBatch  # who draws from which row
    # rows whose token the step before draws, and which of its samples does; empty where all are known
    pending_rows: Sequence[int] | np.ndarray = ()
    pending_places: Sequence[int] | np.ndarray = ()
    prompt_rows: Sequence[PromptRows] = ()  # that predict tokens of prompts which are reported on

    @property
    def num_rows(self) -> int:
        return self.input_ids.shape[0]

    @property
    def has_one_row_each(self) -> bool:
        """Whether every request computes a single row, as in decode: such a batch is known by its number of rows."""
        return self.input_ids.shape[0] == self.seq_lens.shape[0]


class InputBuffers:
    """Room for the largest step, written in place: addresses stay, so that a recorded step can read them again."""

    def __init__(
        self,
        *,
        max_num_rows: int,
        max_num_seqs: int,
        max_blocks_per_seq: int,
        block_size: int,
        pin_memory: bool = False,
    ) -> None:
        """pin_memory: so that a GPU may copy from them while the host goes on."""

        def zeros(shape: int | tuple[int, int], dtype: torch.dtype) -> np.ndarray:
            return torch.zeros(shape, dtype=dtype, pin_memory=pin_memory).numpy()

        self.block_size = block_size
        self.input_ids = zeros(max_num_rows, torch.int64)
        self.positions = zeros(max_num_rows, torch.int64)
        self.slot_mapping = zeros(max_num_rows, torch.int64)
        self.cu_seqlens_q = zeros(max_num_seqs + 1, torch.int32)
        self.seq_lens = zeros(max_num_seqs, torch.int32)
        self.block_tables = zeros((max_num_seqs, max_blocks_per_seq), torch.int32)
        self._table_rows: list[list[int]] = [[] for _ in range(max_num_seqs)]  # what block_tables holds

    def pack(self, plan: SchedulerOutput) -> InputBatch:
        """Writes a non-empty plan."""
        scheduled, T, B = plan.scheduled, plan.num_scheduled_tokens, len(plan.scheduled)
        starts = np.array([item.start for item in scheduled])
        counts = np.array([item.num_tokens for item in scheduled])
        self.seq_lens[:B] = starts + counts
        np.cumsum(counts, out=self.cu_seqlens_q[1 : B + 1])
        self.input_ids[:T] = _token_ids(scheduled, T)
        pending = [(row, item.source) for row, item in enumerate(scheduled) if item.source >= 0]
        self._write_tables(scheduled)
        self._write_places(starts, counts, T)
        return self._batch(plan, pending)

    def _batch(self, plan: SchedulerOutput, pending: list[tuple[int, int]]) -> InputBatch:
        """What has been written. pending: (entry, place among the samples of the step before) of unknown tokens."""
        T, B = plan.num_scheduled_tokens, len(plan.scheduled)
        return InputBatch(
            input_ids=torch.from_numpy(self.input_ids[:T]),
            positions=torch.from_numpy(self.positions[:T]),
            cu_seqlens_q=torch.from_numpy(self.cu_seqlens_q[: B + 1]),
            seq_lens=torch.from_numpy(self.seq_lens[:B]),
            block_tables=torch.from_numpy(self.block_tables[:B]),
            slot_mapping=torch.from_numpy(self.slot_mapping[:T]),
            sampling=SamplingBatch.from_plan(plan, self.cu_seqlens_q[: B + 1]),
            pending_rows=self.cu_seqlens_q[[entry for entry, _ in pending]] if pending else (),
            pending_places=np.array([place for _, place in pending]) if pending else (),
            prompt_rows=prompt_rows(plan, self.cu_seqlens_q),
        )

    def advance(self, plan: SchedulerOutput) -> InputBatch:
        """Writes a later step of the cycle that was packed last, each row a position on; see `later_step`.

        It looks at no request's blocks, which may have moved on: the tables hold what the cycle was given.
        """
        kept, B = [item.source for item in plan.scheduled], len(plan.scheduled)
        if len(self._table_rows) > B and kept != list(range(B)):
            self.block_tables[:B] = self.block_tables[kept]
            self._table_rows = [self._table_rows[row] for row in kept] + [[]] * (len(self._table_rows) - B)
        positions = self.positions[kept] + 1
        self.seq_lens[:B] = positions + 1
        self.cu_seqlens_q[: B + 1] = np.arange(B + 1)
        self._write_places(positions, np.ones(B, np.int64), B)
        return self._batch(plan, pending=[(row, place) for row, place in enumerate(kept)])

    def load(self, batch: InputBatch, drawn_token_ids: Sequence[int]) -> InputBatch:
        """The batch, complete: pending tokens are among those that the step before has drawn."""
        if len(batch.pending_rows):
            self.input_ids[batch.pending_rows] = np.array(drawn_token_ids)[batch.pending_places]
        return batch

    def _write_tables(self, scheduled: list[ScheduledRequest]) -> None:
        """Most rows hold what they held a step ago."""
        for row, item in enumerate(scheduled):
            block_ids = item.request.block_ids
            if self._table_rows[row] != block_ids:
                self.block_tables[row, : len(block_ids)] = block_ids
                self._table_rows[row] = block_ids.copy()

    def _write_places(self, starts: np.ndarray, counts: np.ndarray, num_rows: int) -> None:
        """Position and slot of every row."""
        sequence = np.repeat(np.arange(len(starts)), counts)
        positions = np.arange(num_rows) + (starts - self.cu_seqlens_q[: len(starts)])[sequence]
        self.positions[:num_rows] = positions
        blocks, offsets = np.divmod(positions, self.block_size)
        self.slot_mapping[:num_rows] = self.block_tables[sequence, blocks].astype(np.int64) * self.block_size + offsets


def _token_ids(scheduled: list[ScheduledRequest], num_rows: int) -> list[int]:
    """Zero where a token is pending."""
    if num_rows == len(scheduled):
        return [item.request.token_ids[item.start] if item.source < 0 else 0 for item in scheduled]
    return [i for item in scheduled for i in _known_token_ids(item)]


def _known_token_ids(item: ScheduledRequest) -> Sequence[int]:
    return item.request.token_ids[item.start : item.end] if item.source < 0 else (0,)
