"""Truncation rules: what a request changes in the distribution of its tokens, checked against model and tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from engine.sampling_params import SamplingParams
from kernels.truncated import NUMBERS

NO_IDS = np.empty(0, dtype=np.int32)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TruncationRules:
    """Shared by the samples of a group. Where nothing is changed, only the likeliest tokens are asked for."""

    changes_distribution: bool
    has_penalties: bool
    numbers: bytes  # [8] float64, in the order of kernels.truncated.NUMBERS
    num_top: int  # of how many of the likeliest tokens the log-probabilities are reported
    biased_ids: np.ndarray  # int32
    bias: np.ndarray  # float32
    allowed_ids: np.ndarray  # int32; none allows all
    stop_ids: np.ndarray  # int32, masked before min_tokens
    min_tokens: int
    bad_words: tuple[tuple[int, ...], ...]  # sequences whose last token is masked after the others

    @classmethod
    def from_params(
        cls, params: SamplingParams, *, eos_token_ids: Iterable[int] = (), tokenizer: Any = None, vocab_size: int
    ) -> TruncationRules | None:
        """The rules of a request; None where its logits need not be written out.

        Raises:
            ValueError: for ids outside the vocabulary, bad words without a tokenizer, or rules that allow no token.
        """
        stop_ids = _stop_ids(params, eos_token_ids, vocab_size)
        has_penalties = _has_penalties(params)
        is_changed = has_penalties or _is_truncated(params) or _has_rules_for_ids(params) or bool(stop_ids)
        if not is_changed and not params.logprobs:
            return None
        bias, allowed = params.logit_bias or (), params.allowed_token_ids or ()
        _check_ids("logit_bias", [token_id for token_id, _ in bias], vocab_size)
        _check_ids("allowed_token_ids", allowed, vocab_size)
        bad_words = _encode_bad_words(params.bad_words, tokenizer)
        _check_something_is_allowed(allowed, stop_ids, bad_words)
        return cls(
            changes_distribution=is_changed,
            has_penalties=has_penalties,
            numbers=np.array([_number(params, name, is_changed) for name in NUMBERS], np.float64).tobytes(),
            num_top=params.logprobs,
            biased_ids=np.array([token_id for token_id, _ in bias], np.int32),
            bias=np.array([value for _, value in bias], np.float32),
            allowed_ids=np.array(allowed, np.int32),
            stop_ids=np.array(sorted(stop_ids), np.int32),
            min_tokens=params.min_tokens,
            bad_words=bad_words,
        )

    def masked_ids(self, token_ids: Sequence[int], num_output_tokens: int) -> np.ndarray:
        """int32 ids that the next token cannot be; `token_ids` end with the output."""
        ends = [word[-1] for word in self.bad_words if _is_begun(word, token_ids, num_output_tokens)]
        stop_ids = self.stop_ids if num_output_tokens < self.min_tokens else NO_IDS
        return np.unique(np.append(stop_ids, np.array(ends, np.int32))) if ends else stop_ids


def _number(params: SamplingParams, name: str, is_changed: bool) -> float:
    if name == "is_plain":
        return not is_changed
    return params.logprob_temperature if name == "temperature" else getattr(params, name)


def _has_penalties(params: SamplingParams) -> bool:
    penalties = (params.repetition_penalty, params.presence_penalty, params.frequency_penalty)
    return penalties != (1.0, 0.0, 0.0)


def _is_truncated(params: SamplingParams) -> bool:
    """Greedy takes the likeliest token, which every truncation keeps."""
    return not params.is_greedy and (params.min_p, params.top_k, params.top_p) != (0.0, 0, 1.0)


def _has_rules_for_ids(params: SamplingParams) -> bool:
    return bool(params.logit_bias or params.allowed_token_ids or params.bad_words)


def _stop_ids(params: SamplingParams, eos_token_ids: Iterable[int], vocab_size: int) -> set[int]:
    """The tokens that end a completion, if they must not come too early."""
    if not params.min_tokens:
        return set()
    stop_ids = {*params.stop_token_ids, *(() if params.ignore_eos else eos_token_ids)}
    return {token_id for token_id in stop_ids if token_id < vocab_size}


def _check_ids(name: str, token_ids: Sequence[int], vocab_size: int) -> None:
    for token_id in token_ids:
        if token_id >= vocab_size:
            raise ValueError(f"{name} names token id {token_id}, outside the vocabulary of {vocab_size} tokens")


def _encode_bad_words(words: Sequence[str], tokenizer: Any) -> tuple[tuple[int, ...], ...]:
    """Token ids of each word as a text may begin with it, and as it stands after a space."""
    if words and tokenizer is None:
        raise ValueError(f"bad_words={list(words)} need a tokenizer, which this model directory has not")
    texts = [text for word in words for text in (word.lstrip(" "), " " + word.lstrip(" "))]
    sequences = [tuple(tokenizer.encode(text, add_special_tokens=False)) for text in texts]
    return tuple(dict.fromkeys(sequence for sequence in sequences if sequence))


def _check_something_is_allowed(
    allowed: Sequence[int], stop_ids: set[int], bad_words: Sequence[tuple[int, ...]]
) -> None:
    barred = stop_ids | {word[0] for word in bad_words if len(word) == 1}
    if allowed and barred.issuperset(allowed):
        raise ValueError(
            f"allowed_token_ids={list(allowed)} are all barred by bad_words, or by min_tokens as stop tokens: allow "
            "another token"
        )


def _is_begun(word: tuple[int, ...], token_ids: Sequence[int], num_output_tokens: int) -> bool:
    """Whether all of a word but its last token has just been drawn."""
    num_begun = len(word) - 1
    if num_begun == 0:
        return True
    return num_begun <= num_output_tokens and tuple(token_ids[-num_begun:]) == word[:-1]
