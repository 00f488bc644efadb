"""Prompt log-probabilities: what the model itself gives each token of a prompt, computed along with the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kernels.profiles import GPU_PROFILES
from kernels.truncated import NUMBERS, DrawOptions, IdLists, truncated_sample

if TYPE_CHECKING:
    from engine.model import PackedLinear
    from engine.request import Request
    from engine.step_plan import SchedulerOutput

MAX_ROWS = 128  # whose sums over the vocabulary exist at once; with fewer, the head is read too often
MAX_LOGITS_ROWS = 64  # that exist at once

Entry = dict[int, float]
"""Log-probabilities by token id: the likeliest first, the prompt's own token last if it is none of them."""


class PromptRows(NamedTuple):
    """Rows of a step that each predict a known token of a prompt."""

    samples: Sequence[Request]  # of the group: the prompt is computed for all of them
    num_top: int
    first_token: int  # position of the token that the first row predicts
    first_row: int
    target_ids: list[int]


class ScoredRows(NamedTuple):
    """What came out of PromptRows."""

    samples: Sequence[Request]
    first_token: int
    entries: list[Entry]

    def deliver(self) -> None:
        """Gives the samples their entries. Whatever they had from there on was of an earlier pass over the prompt."""
        for sample in self.samples:
            assert sample.prompt_logprobs is not None, f"{sample} asks for no prompt_logprobs"
            assert len(sample.prompt_logprobs) >= self.first_token, f"{sample}: entries before {self.first_token}"
            sample.prompt_logprobs[self.first_token :] = self.entries


def prompt_rows(plan: SchedulerOutput, cu_seqlens: Sequence[int] | np.ndarray) -> list[PromptRows]:
    """Of the entries that report on their prompt; the rows of the i-th are [cu_seqlens[i], cu_seqlens[i + 1])."""
    rows = []
    for place, item in enumerate(plan.scheduled):
        request = item.request
        if request.reports_on_prompt:
            targets = request.prompt_token_ids[item.start + 1 : item.end + 1]
            samples = item.samples or (request, *request.siblings)  # a group that this step completes has forked
            num_top, first_row = request.params.prompt_logprobs, int(cu_seqlens[place])
            if targets:
                rows.append(PromptRows(samples, num_top, item.start + 1, first_row, targets))
    return rows


def score_rows(hidden_TD: torch.Tensor, head: PackedLinear, rows: PromptRows) -> ScoredRows:
    """Entries of the tokens that the rows predict, raw and at temperature 1: the trainer's own bits."""
    hidden_RD = hidden_TD[rows.first_row : rows.first_row + len(rows.target_ids)]
    own = _logprobs(hidden_RD, head, torch.tensor(rows.target_ids)).tolist()
    likeliest = _likeliest(hidden_RD, head, rows.num_top)
    entries = [{**top, token_id: value} for token_id, value, top in zip(rows.target_ids, own, likeliest, strict=True)]
    return ScoredRows(rows.samples, rows.first_token, entries)


def _logprobs(hidden_RD: torch.Tensor, head: PackedLinear, target_ids: torch.Tensor) -> torch.Tensor:
    """[R] float32, on the CPU, by the trainer's own function."""
    temperature, target_ids = torch.ones(MAX_ROWS, device=hidden_RD.device), target_ids.to(hidden_RD.device)
    parts = [
        head.ops.token_logprobs(hidden, head.packed, head.num_outputs, targets, temperature[: len(targets)])
        for hidden, targets in zip(hidden_RD.split(MAX_ROWS), target_ids.split(MAX_ROWS), strict=True)
    ]
    return torch.cat(parts).cpu()


def _likeliest(hidden_RD: torch.Tensor, head: PackedLinear, num_top: int) -> Iterator[Entry]:
    """Of each row: the likeliest ids, equals by ascending id; their logits are written out for it."""
    if not num_top:
        yield from ({} for _ in range(len(hidden_RD)))
        return
    for hidden in hidden_RD.split(MAX_LOGITS_ROWS):
        ids_RK, logprobs_RK = _top(hidden, head, num_top)
        for ids, logprobs in zip(ids_RK.tolist(), logprobs_RK.tolist(), strict=True):
            yield {token_id: value for token_id, value in zip(ids, logprobs, strict=True) if token_id >= 0}


def _top(hidden_RD: torch.Tensor, head: PackedLinear, num_top: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(ids, log-probabilities), [R, num_top]; an id of -1 is none."""
    num_rows = len(hidden_RD)
    logits_RV = head.ops.linear(hidden_RD, head.packed, head.num_outputs, into_residual=True).cpu()
    draws = torch.zeros(5, num_rows, dtype=torch.int64)
    draws[0], draws[4] = torch.arange(num_rows), 1
    result = truncated_sample(logits_RV, draws, _nothing_changed(num_rows), num_top)
    if head.ops.profile.name not in GPU_PROFILES:
        return result.top_ids, result.top_logprobs
    # The CPU has found the ids, but by its own order of sums.
    logprobs = _logprobs(hidden_RD.repeat_interleave(num_top, 0), head, result.top_ids.clamp(min=0).flatten())
    return result.top_ids, logprobs.view(num_rows, num_top)


def _nothing_changed(num_draws: int) -> DrawOptions:
    neutral = {"temperature": 1.0, "repetition_penalty": 1.0, "top_p": 1.0, "is_plain": 1.0}
    numbers = torch.tensor([[neutral.get(name, 0.0)] * num_draws for name in NUMBERS], dtype=torch.float64)
    none = IdLists(offsets=torch.zeros(num_draws + 1, dtype=torch.int64), ids=torch.zeros(0, dtype=torch.int32))
    no_counts, no_bias = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    return DrawOptions(
        numbers=numbers, seen=none, counts=no_counts, biased=none, bias=no_bias, masked=none, allowed=none
    )
