"""Prompt log-probabilities: what the model itself gives each token of a prompt, computed along with the prompt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from kernels.truncated import NUMBERS, DrawOptions, IdLists, truncated_sample

if TYPE_CHECKING:
    from engine.model import PackedLinear
    from engine.step_plan import SchedulerOutput

MAX_ROWS = 64  # whose logits, or sums over the vocabulary, exist at once

Entry = dict[int, float]
"""Log-probabilities by token id: the likeliest first, the prompt's own token last if it is none of them."""


class PromptLogprobs:
    """Those of the prompt that the samples of a group share. They are of one version of the weights, as their first
    tokens are, unless running requests were told to `keep` what they had.
    """

    def __init__(self, num_tokens: int, num_top: int) -> None:
        self.num_top = num_top
        self.entries: list[Entry | None] = [None] * num_tokens
        self.num_known = 1  # nothing comes before the first token, so it has no probability

    @property
    def is_complete(self) -> bool:
        return self.num_known >= len(self.entries)

    def take(self, first: int, entries: Sequence[Entry]) -> None:
        """The entries of the tokens from `first` on."""
        self.entries[first : first + len(entries)] = entries
        self.num_known = max(self.num_known, first + len(entries))

    def reset(self) -> None:
        """The weights have changed before a token was drawn: the prompt is computed again."""
        self.num_known = 1


class PromptRows(NamedTuple):
    """Rows of a step that each predict a known token of a prompt."""

    collected: PromptLogprobs
    first_token: int  # position of the token that the first row predicts
    first_row: int
    target_ids: list[int]


class ScoredRows(NamedTuple):
    """What came out of PromptRows."""

    collected: PromptLogprobs
    first_token: int
    entries: list[Entry]


def prompt_rows(plan: SchedulerOutput, cu_seqlens: Sequence[int] | np.ndarray) -> list[PromptRows]:
    """Of the entries that report on their prompt; the rows of the i-th are [cu_seqlens[i], cu_seqlens[i + 1])."""
    rows = []
    for place, item in enumerate(plan.scheduled):
        collected = item.request.prompt_logprobs
        if collected is not None and not collected.is_complete:
            targets = item.request.prompt_token_ids[item.start + 1 : item.end + 1]
            if targets:
                rows.append(PromptRows(collected, item.start + 1, int(cu_seqlens[place]), targets))
    return rows


def score_rows(hidden_TD: torch.Tensor, head: PackedLinear, rows: PromptRows) -> ScoredRows:
    """Entries of the tokens that the rows predict, raw and at temperature 1: the trainer's own bits."""
    entries: list[Entry] = []
    for first in range(0, len(rows.target_ids), MAX_ROWS):
        targets = rows.target_ids[first : first + MAX_ROWS]
        hidden_RD = hidden_TD[rows.first_row + first : rows.first_row + first + len(targets)]
        own = _own_logprobs(hidden_RD, head, targets)
        likeliest = _likeliest(hidden_RD, head, rows.collected.num_top)
        entries += [{**top, token_id: value} for token_id, value, top in zip(targets, own, likeliest, strict=True)]
    return ScoredRows(rows.collected, rows.first_token, entries)


def _own_logprobs(hidden_RD: torch.Tensor, head: PackedLinear, targets: list[int]) -> list[float]:
    target_ids = torch.tensor(targets, device=hidden_RD.device)
    temperature = torch.ones(len(targets), device=hidden_RD.device)
    return head.ops.token_logprobs(hidden_RD, head.packed, head.num_outputs, target_ids, temperature).tolist()


def _likeliest(hidden_RD: torch.Tensor, head: PackedLinear, num_top: int) -> Iterator[Entry]:
    """Of each row: the likeliest ids, equals by ascending id; their logits are written out for it."""
    num_rows = len(hidden_RD)
    if not num_top:
        yield from ({} for _ in range(num_rows))
        return
    logits_RV = head.ops.linear(hidden_RD, head.packed, head.num_outputs, into_residual=True).cpu()
    draws = torch.zeros(5, num_rows, dtype=torch.int64)
    draws[0], draws[4] = torch.arange(num_rows), 1
    result = truncated_sample(logits_RV, draws, _nothing_changed(num_rows), num_top)
    for ids, logprobs in zip(result.top_ids.tolist(), result.top_logprobs.tolist(), strict=True):
        yield {token_id: value for token_id, value in zip(ids, logprobs, strict=True) if token_id >= 0}


def _nothing_changed(num_draws: int) -> DrawOptions:
    neutral = {"temperature": 1.0, "repetition_penalty": 1.0, "top_p": 1.0, "is_plain": 1.0}
    numbers = torch.tensor([[neutral.get(name, 0.0)] * num_draws for name in NUMBERS], dtype=torch.float64)
    none = IdLists(offsets=torch.zeros(num_draws + 1, dtype=torch.int64), ids=torch.zeros(0, dtype=torch.int32))
    no_counts, no_bias = torch.zeros(0, dtype=torch.int32), torch.zeros(0)
    return DrawOptions(
        numbers=numbers, seen=none, counts=no_counts, biased=none, bias=no_bias, masked=none, allowed=none
    )
