"""Group requests: checks and tokenises prompts in the caller's process and gives every group its id, cost and seed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import Completion, SamplingParams
from engine.prompts import derive_seed, one_per_prompt
from engine.tokenizer import Prompt, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """All samples of one prompt, as they travel to an engine."""

    group_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # its seed is always set
    resume: tuple[Completion, ...] = ()  # what an engine that is gone had drawn for it


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """The finished samples of one GroupRequest, as they come back from an engine."""

    group_id: str
    completions: list[Completion]  # by sample index


Partials = dict[str, list[Completion]]
"""Samples by group id, finished and unfinished ones, as they were handed over before a switch of weights."""


def seeded(params: SamplingParams, run_seed: int, group_id: str) -> SamplingParams:
    """`params` with the group's seed, unless the caller chose one."""
    if params.seed is not None:
        return params
    return replace(params, seed=derive_seed(run_seed, group_id))


def token_cost(prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
    """Upper bound of the tokens an engine computes for the group: the prompt once, every sample in full."""
    return len(prompt_token_ids) + params.n * params.max_tokens


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Token ids of each prompt; ValueError names the prompt that is empty, too long or out of the vocabulary."""
    return [encode_prompt(tokenizer, i, prompt, vocab_size, max_model_len) for i, prompt in enumerate(prompts)]


def encode_prompt(tokenizer: Any, position: int, prompt: Prompt, vocab_size: int, max_model_len: int) -> list[int]:
    """Token ids of the prompt at `position`; ValueError as `encode_prompts`."""
    if not isinstance(prompt, (str, Sequence)):
        raise ValueError(f"prompts[{position}] must be text, token ids or chat messages, got {type(prompt).__name__}")
    try:
        token_ids = encode(tokenizer, prompt, vocab_size)
    except ValueError as error:
        raise ValueError(f"prompts[{position}]: {error}") from error
    if len(token_ids) >= max_model_len:
        raise ValueError(
            f"prompts[{position}] has {len(token_ids)} tokens, which leaves no room for a completion within "
            f"max_model_len={max_model_len}: shorten it"
        )
    return token_ids


def per_prompt_metadata(metadata: Sequence[Mapping[str, Any]] | None, num_prompts: int) -> list[Mapping[str, Any]]:
    """One mapping for each prompt, handed through to its rollouts untouched."""
    if metadata is None:
        return [{} for _ in range(num_prompts)]
    return one_per_prompt("metadata", metadata, num_prompts, Mapping)


def per_prompt_group_ids(group_ids: Sequence[str] | None, num_prompts: int) -> list[str | None]:
    """The caller's id of each group; None where the coordinator shall give the next free one."""
    if group_ids is None:
        return [None] * num_prompts
    checked = one_per_prompt("group_ids", group_ids, num_prompts, str)
    for group_id, count in Counter(checked).items():
        if count > 1:
            raise ValueError(f"group_ids must be unique within a call: {group_id!r} is given {count} times")
    return checked
