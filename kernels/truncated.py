"""Sampling from a changed distribution: penalties, bias and masks, temperature, then min-p, top-k and top-p.

Works on logits that are written out, unlike `kernels.logprobs`, and says what was kept (docs/numerics.md, "Truncated
sampling").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kernels.library import library
from kernels.linear import check_float32

MAX_VOCAB_SIZE = 2**19  # so that integer masses add up within 64 bits


@dataclass(frozen=True, slots=True, kw_only=True)
class IdLists:
    """One list of token ids for each of n draws; within a list no id comes twice. Ids are checked by the caller."""

    offsets: torch.Tensor  # [n + 1] int64: the ids of draw i are ids[offsets[i] : offsets[i + 1]]
    ids: torch.Tensor  # int32, in the vocabulary


@dataclass(frozen=True, slots=True, kw_only=True)
class DrawOptions:
    """What changes the distribution of each of n draws."""

    numbers: torch.Tensor  # [8, n] float64, the rows in the order of NUMBERS
    seen: IdLists  # prompt and output, for the penalties
    counts: torch.Tensor  # int32, how often each seen id is in the output
    biased: IdLists
    bias: torch.Tensor  # float32, for each biased id
    masked: IdLists  # bad words and, before min_tokens, stop tokens
    allowed: IdLists  # an empty list allows every id


NUMBERS = (
    "temperature",  # 1 where greedy
    "repetition_penalty",  # 1 is neutral
    "presence_penalty",
    "frequency_penalty",
    "min_p",  # 0 is off, as are 0 for top_k and 1 for top_p
    "top_k",
    "top_p",
    "is_plain",  # 1: nothing is changed, so the draw is that of `kernels.logprobs.sample`
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TruncatedDraws:
    """What was drawn, and from what."""

    token_ids: torch.Tensor  # [n] int64
    logprobs: torch.Tensor  # [n] float32, of the distribution sampled from: over the kept ids
    raw_logprobs: torch.Tensor  # [n] float32, of the logits as they came, at temperature 1
    kept_mass: torch.Tensor  # [n] float32, share of the distribution before truncation that the kept ids hold
    num_kept: torch.Tensor  # [n] int64
    top_ids: torch.Tensor  # [n, num_top] int64, the likeliest kept ids; -1 where fewer are kept
    top_logprobs: torch.Tensor  # [n, num_top] float32, as logprobs; -inf there


def truncated_sample(
    logits_RV: torch.Tensor, draws: torch.Tensor, options: DrawOptions, num_top: int = 0
) -> TruncatedDraws:
    """Draws one token for each column of `draws`, and names the `num_top` likeliest ids that were kept.

    Args:
        logits_RV: float32, contiguous, as the output head gives them; several draws may share a row.
        draws: [5, n] int64: row of the logits, seed (64 bits), position in the completion, sample index, greedy.
    """
    check_float32(logits_RV, "logits")
    num_draws, vocab_size = draws.shape[1], logits_RV.shape[1]
    if vocab_size > MAX_VOCAB_SIZE:
        raise ValueError(f"a vocabulary of {vocab_size} ids exceeds the {MAX_VOCAB_SIZE} that exact masses allow")
    if not logits_RV.is_contiguous() or not draws.is_contiguous() or not options.numbers.is_contiguous():
        raise ValueError("logits, draws and options.numbers must be contiguous")
    result = _empty_draws(logits_RV, num_draws, num_top)
    lists = options
    failed = library().ls_truncated_sample(
        logits_RV.data_ptr(), draws.data_ptr(), options.numbers.data_ptr(),
        lists.seen.offsets.data_ptr(), lists.seen.ids.data_ptr(), lists.counts.data_ptr(),
        lists.biased.offsets.data_ptr(), lists.biased.ids.data_ptr(), lists.bias.data_ptr(),
        lists.masked.offsets.data_ptr(), lists.masked.ids.data_ptr(),
        lists.allowed.offsets.data_ptr(), lists.allowed.ids.data_ptr(),
        result.token_ids.data_ptr(), result.logprobs.data_ptr(), result.raw_logprobs.data_ptr(),
        result.kept_mass.data_ptr(), result.num_kept.data_ptr(), result.top_ids.data_ptr(),
        result.top_logprobs.data_ptr(), num_draws, vocab_size, num_top,
    )  # fmt: skip
    if failed:
        raise MemoryError(f"no memory to sample from logits of {vocab_size} ids")
    return result


def _empty_draws(logits: torch.Tensor, num_draws: int, num_top: int) -> TruncatedDraws:
    return TruncatedDraws(
        token_ids=logits.new_empty(num_draws, dtype=torch.int64),
        logprobs=logits.new_empty(num_draws),
        raw_logprobs=logits.new_empty(num_draws),
        kept_mass=logits.new_empty(num_draws),
        num_kept=logits.new_empty(num_draws, dtype=torch.int64),
        top_ids=logits.new_empty(num_draws, num_top, dtype=torch.int64),
        top_logprobs=logits.new_empty(num_draws, num_top),
    )
