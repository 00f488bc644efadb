"""Sampler: draws the next tokens of a step and their log-probabilities, from the sums that the trainer uses too."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from engine.logits_batch import LogitsBatch
from engine.model import PackedLinear
from engine.outputs import TokenDetail
from engine.prompt_logprobs import PromptRows, ScoredRows, score_rows
from engine.sampling_batch import SamplingBatch
from kernels.truncated import truncated_sample


class SamplerOutput(NamedTuple):
    """What a step draws and reports, in order of its samples."""

    token_ids: list[int]
    logprobs: list[float]  # each exactly a float32
    details: list[TokenDetail | None] | None  # None where nobody has any
    prompt_logprobs: list[ScoredRows]


class Sampler:
    """A draw is keyed by the request's seed, the position in its completion and the sample's index alone.

    Requests that only have a temperature are drawn without their logits ever being written out. The others take
    another road in the same step, each by its own parameters and never because of its neighbours; those that change
    nothing and only ask for the likeliest tokens draw the same bits there.
    """

    def __init__(self, lm_head: PackedLinear) -> None:
        self.lm_head = lm_head

    def __call__(
        self, hidden_TD: torch.Tensor, batch: SamplingBatch, prompt_rows: Sequence[PromptRows] = ()
    ) -> SamplerOutput:
        """prompt_rows: of prompts that are reported on."""
        scored = [score_rows(hidden_TD, self.lm_head, rows) for rows in prompt_rows]
        return SamplerOutput(*self._draw(hidden_TD, batch), scored)

    def _draw(
        self, hidden_TD: torch.Tensor, batch: SamplingBatch
    ) -> tuple[list[int], list[float], list[TokenDetail | None] | None]:
        token_ids, logprobs = self._draw_plain(hidden_TD, batch)
        if batch.written_out is None:
            return token_ids, logprobs, None
        drawn: list[tuple[int, float, TokenDetail | None]] = [(0, 0.0, None)] * batch.num_samples
        for place, token_id, logprob in zip(batch.plain_places, token_ids, logprobs, strict=True):
            drawn[place] = token_id, logprob, None
        for part in batch.logits_batches():
            for place, one in zip(part.places, self._draw_from_logits(hidden_TD, part), strict=True):
                drawn[place] = one
        token_ids, logprobs, details = map(list, zip(*drawn, strict=True))
        return token_ids, logprobs, details

    def _draw_plain(self, hidden_TD: torch.Tensor, batch: SamplingBatch) -> tuple[list[int], list[float]]:
        if not batch.rows.numel():
            return [], []
        if batch.rows.numel() < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, batch.rows)
        head = self.lm_head
        token_ids, logprobs = head.ops.sample(hidden_TD, head.packed, head.num_outputs, batch.temperature, batch.draws)
        return token_ids.tolist(), logprobs.tolist()

    def _draw_from_logits(
        self, hidden_TD: torch.Tensor, batch: LogitsBatch
    ) -> Iterator[tuple[int, float, TokenDetail]]:
        """(token id, log-probability, detail) of each sample of the batch."""
        head, rows_RD = self.lm_head, hidden_TD.index_select(0, batch.rows.to(hidden_TD.device))
        logits_RV = head.ops.linear(rows_RD, head.packed, head.num_outputs, into_residual=True)
        result = truncated_sample(logits_RV.cpu(), batch.draws, batch.options, max(batch.num_top))
        columns = (result.token_ids, result.logprobs, result.raw_logprobs, result.kept_mass)
        listed = (result.top_ids, result.top_logprobs)
        positions = batch.draws[2].tolist()
        rows = zip(batch.samples, positions, *(column.tolist() for column in (*columns, *listed)), strict=True)
        for sample, position, token_id, logprob, raw_logprob, kept_mass, top_ids, top in rows:
            num_top = sample.rules.num_top
            sample.note_drawn(position, token_id)
            top_logprobs = _top_logprobs(top_ids[:num_top], top[:num_top], token_id, logprob)
            yield token_id, logprob, TokenDetail(raw_logprob, kept_mass, top_logprobs)


def _top_logprobs(top_ids: list[int], logprobs: list[float], token_id: int, logprob: float) -> dict[int, float]:
    """By token id, the likeliest first; the token that was drawn comes last if it is none of them."""
    top_logprobs = {one: value for one, value in zip(top_ids, logprobs, strict=True) if one >= 0}
    top_logprobs.setdefault(token_id, logprob)
    return top_logprobs
