"""SamplingBatch: who draws from which row of a step, as the columns that the sampling kernels read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.draw_key import DRAW_KEY
from engine.step_plan import SchedulerOutput


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """R rows that are sampled from, n times in all: siblings share their prompt's last row."""

    rows: torch.Tensor  # [R] int64, ascending rows of the step
    temperature: torch.Tensor  # [R] float32, 1.0 where greedy
    draws: torch.Tensor  # [5, n] int64: entry of rows, seed, position in the completion, sample index, greedy

    @classmethod
    def from_plan(cls, plan: SchedulerOutput, cu_seqlens: Sequence[int] | np.ndarray) -> SamplingBatch:
        """cu_seqlens [B + 1]: the rows of the plan's i-th entry are [cu_seqlens[i], cu_seqlens[i + 1]).

        It runs in every decode step, so what a sample does not change is packed once (`Request.draw_key`).
        """
        samples = [sample for item in plan.scheduled for sample in item.samples]
        keys = np.frombuffer(b"".join([sample.draw_key for sample in samples]), DRAW_KEY)
        counts = np.array([len(item.samples) for item in plan.scheduled])
        sampled = np.flatnonzero(counts)
        counts = counts[sampled]
        draws = np.empty((5, len(samples)), np.int64)
        draws[0] = np.repeat(np.arange(len(counts)), counts)
        draws[1] = keys["seed"]
        draws[2] = [len(sample.token_ids) - sample.num_prompt_tokens for sample in samples]
        draws[3] = keys["index"]
        draws[4] = keys["is_greedy"]
        leaders = np.cumsum(counts) - counts  # the first sample of each row: all of a row share their parameters
        return cls(
            rows=torch.from_numpy(np.asarray(cu_seqlens, dtype=np.int64)[sampled + 1] - 1),
            temperature=torch.from_numpy(keys["temperature"][leaders]),
            draws=torch.from_numpy(draws),
        )
