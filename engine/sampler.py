"""Sampler: draws the next tokens of a step and their log-probabilities, from the sums that the trainer uses too."""

from __future__ import annotations

import torch

from engine.model import PackedLinear
from engine.sampling_batch import SamplingBatch
from kernels.logprobs import sample


class Sampler:
    """A draw is keyed by the request's seed, the position in its completion and the sample's index alone."""

    def __init__(self, lm_head: PackedLinear) -> None:
        self.lm_head = lm_head

    def __call__(self, hidden_TD: torch.Tensor, batch: SamplingBatch) -> tuple[list[int], list[float]]:
        """(token ids, log-probabilities) in the order of the plan's samples; the latter are exactly float32."""
        if not batch.rows.numel():
            return [], []
        if batch.rows.numel() < hidden_TD.shape[0]:
            hidden_TD = hidden_TD.index_select(0, batch.rows)
        row, seed, position, index, is_greedy = batch.draws
        token_ids, logprobs = sample(
            hidden_TD, self.lm_head.packed, self.lm_head.num_outputs, batch.temperature, row, seed, position, index,
            is_greedy.to(torch.uint8), self.lm_head.is_dot,
        )  # fmt: skip
        return token_ids.tolist(), logprobs.tolist()
