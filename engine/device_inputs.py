"""DeviceInputs: a step's plan as tensors on a device, at addresses that stay: a captured graph reads them again."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from engine.captured_steps import MAX_GRAPH_ROWS, padded_num_rows
from engine.input_batch import InputBatch, InputBuffers
from engine.sampling_batch import SamplingBatch
from engine.step_plan import SchedulerOutput

NO_SLOT = -1  # where the key and value of a row that fills up a graph go: nowhere
_COPIED = ("input_ids", "positions", "slot_mapping", "cu_seqlens_q", "seq_lens", "block_tables")


class DeviceInputs:
    """The twin of `InputBuffers`: written on the host, in pinned memory, then copied.

    Decode steps are filled up to the size of a graph with rows that see one key and store nothing: what they compute
    is read by nobody.
    """

    def __init__(
        self, device: torch.device, *, max_num_rows: int, max_num_seqs: int, max_blocks_per_seq: int, block_size: int
    ) -> None:
        is_cuda = device.type == "cuda"
        num_padded = max(padded_num_rows(min(max_num_seqs, MAX_GRAPH_ROWS)), max_num_seqs)
        self.device = device
        self._sizes = {
            "max_num_rows": max(max_num_rows, num_padded),
            "max_num_seqs": num_padded,
            "max_blocks_per_seq": max_blocks_per_seq,
            "block_size": block_size,
            "pin_memory": is_cuda,
        }
        self._host = InputBuffers(**self._sizes)
        self._tensors = {name: torch.from_numpy(getattr(self._host, name)).to(device, copy=True) for name in _COPIED}
        self._copied = torch.cuda.Event() if is_cuda else None

    def twin(self) -> DeviceInputs:
        """Another one on the same device memory: what it packs may wait on the host until this one's step has run."""
        twin = copy.copy(self)
        twin._host = InputBuffers(**self._sizes)
        twin._copied = None if self._copied is None else torch.cuda.Event()
        return twin

    def pack(self, plan: SchedulerOutput) -> InputBatch:
        """Writes a non-empty plan on the host; good until this one packs the next."""
        if self._copied is not None:
            self._copied.synchronize()  # a step that draws nothing does not wait for the device
        return self._host.pack(plan)

    def advance(self, plan: SchedulerOutput) -> InputBatch:
        """A later step of the cycle that was packed last; see `InputBuffers.advance`."""
        if self._copied is not None:
            self._copied.synchronize()
        return self._host.advance(plan)

    def load(self, batch: InputBatch, drawn_token_ids: Sequence[int]) -> InputBatch:
        """The batch on the device, complete: pending tokens are among those that the step before has drawn."""
        batch = self._host.load(batch, drawn_token_ids)
        if batch.has_one_row_each:
            batch = self._filled_up(batch)
        tensors = {name: self._copy(name, getattr(batch, name).shape[0]) for name in _COPIED}
        batch = replace(batch, **tensors, sampling=_on_device(batch.sampling, self.device))
        if self._copied is not None:
            self._copied.record()
        return batch

    def _filled_up(self, batch: InputBatch) -> InputBatch:
        first, end = batch.num_rows, padded_num_rows(batch.num_rows)
        host = self._host
        host.input_ids[first:end], host.positions[first:end] = 0, 0
        host.slot_mapping[first:end], host.seq_lens[first:end] = NO_SLOT, 1
        host.cu_seqlens_q[first + 1 : end + 1] = np.arange(first + 1, end + 1)
        sizes = {name: end + (name == "cu_seqlens_q") for name in _COPIED}  # tables keep blocks that exist
        return replace(batch, **{name: torch.from_numpy(getattr(host, name)[:size]) for name, size in sizes.items()})

    def _copy(self, name: str, size: int) -> torch.Tensor:
        source = torch.from_numpy(getattr(self._host, name)[:size])
        return self._tensors[name][:size].copy_(source, non_blocking=True)


def _on_device(batch: SamplingBatch, device: torch.device) -> SamplingBatch:
    """The draws of the plain road on the device; the other road ends on the CPU."""
    rows, temperature = (x.to(device, non_blocking=True) for x in (batch.rows, batch.temperature))
    return replace(batch, rows=rows, temperature=temperature, draws=_aligned_rows(batch.draws, device))


def _aligned_rows(draws: torch.Tensor, device: torch.device) -> torch.Tensor:
    """draws [5, n] so that every row begins at a multiple of 16 bytes, by which Triton chooses the kernel."""
    num_draws = draws.shape[1]
    padded = draws.new_zeros(draws.shape[0], num_draws + num_draws % 2)
    padded[:, :num_draws] = draws
    return padded.to(device, non_blocking=True)[:, :num_draws]
