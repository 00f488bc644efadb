"""SamplingBatch: who draws from which row of a step, as the columns that the sampling kernels read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from engine.draw_key import DRAW_KEY
from engine.logits_batch import LogitsBatch
from engine.request import Request
from engine.step_plan import SchedulerOutput


class WrittenOut(NamedTuple):
    """m samples of a step whose logits are written out; see `LogitsBatch.split`."""

    samples: Sequence[Request]  # all of the step
    places: np.ndarray  # [m] of those concerned among them
    rows: np.ndarray  # [m] the row each draws from, ascending
    draws: np.ndarray  # [5, m]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingBatch:
    """R rows that are sampled from, n times in all: siblings share their prompt's last row.

    These are the draws of the plain road, which never sees logits. Samples whose distribution is changed, or that ask
    for the likeliest tokens, are `written_out` instead.
    """

    rows: torch.Tensor  # [R] int64, ascending rows of the step
    temperature: torch.Tensor  # [R] float32, 1.0 where greedy
    draws: torch.Tensor  # [5, n] int64: entry of rows, seed, position in the completion, sample index, greedy
    plain_places: Sequence[int]  # [n] of the draws among all samples
    written_out: WrittenOut | None = None

    @classmethod
    def from_plan(cls, plan: SchedulerOutput, cu_seqlens: Sequence[int] | np.ndarray) -> SamplingBatch:
        """cu_seqlens [B + 1]: the rows of the plan's i-th entry are [cu_seqlens[i], cu_seqlens[i + 1]).

        It runs in every decode step, so what a sample does not change is packed once (`Request.draw_key`). The step
        before may be under way still: nothing here depends on what it draws.
        """
        samples = [sample for item in plan.scheduled for sample in item.samples]
        keys = np.frombuffer(b"".join([sample.draw_key for sample in samples]), DRAW_KEY)
        counts = [len(item.samples) for item in plan.scheduled]
        rows = np.repeat(np.asarray(cu_seqlens, dtype=np.int64)[1:] - 1, counts)
        draws = np.empty((5, len(samples)), np.int64)
        draws[1] = keys["seed"]
        draws[2] = np.repeat([item.completion_position for item in plan.scheduled], counts)
        draws[3] = keys["index"]
        draws[4] = keys["is_greedy"]
        if not keys["needs_logits"].any():
            return cls._plain(rows, keys["temperature"], draws, range(len(samples)))
        written, plain = np.flatnonzero(keys["needs_logits"]), np.flatnonzero(keys["needs_logits"] == 0)
        written_out = WrittenOut(samples, written, rows[written], draws.take(written, axis=1))
        return cls._plain(
            rows[plain], keys["temperature"][plain], draws.take(plain, axis=1), plain.tolist(), written_out
        )

    @classmethod
    def _plain(
        cls,
        rows: np.ndarray,
        temperature: np.ndarray,
        draws: np.ndarray,
        plain_places: Sequence[int],
        written_out: WrittenOut | None = None,
    ) -> SamplingBatch:
        """From the row and the temperature of every draw; draws of one row stand together and share the latter."""
        is_first = np.diff(rows, prepend=-1) != 0
        draws[0] = np.cumsum(is_first) - 1
        return cls(
            rows=torch.from_numpy(rows[is_first]),
            temperature=torch.from_numpy(temperature[is_first]),
            draws=torch.from_numpy(draws),
            plain_places=plain_places,
            written_out=written_out,
        )

    def logits_batches(self) -> Iterator[LogitsBatch]:
        """Those whose logits are written out, once the tokens of the step before are known: penalties count them."""
        if self.written_out is not None:
            yield from LogitsBatch.split(*self.written_out)

    @property
    def num_samples(self) -> int:
        """Of both roads."""
        return len(self.plain_places) + (0 if self.written_out is None else len(self.written_out.places))
