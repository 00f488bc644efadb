"""Group requests: checks and tokenises prompts in the caller's process and gives every group its id, cost and seed."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from engine import Completion, SamplingParams
from engine.tokenizer import Prompt, encode


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupRequest:
    """All samples of one prompt, as they travel to an engine."""

    group_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # its seed is always set


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupResult:
    """The finished samples of one GroupRequest, as they come back from an engine."""

    group_id: str
    completions: list[Completion]  # by sample index


def group_seed(run_seed: int, group_id: str) -> int:
    """64-bit sampling seed of a group; the engine adds the sample's index to its random counter."""
    return int.from_bytes(hashlib.blake2b(run_seed.to_bytes(8, "little") + group_id.encode()).digest()[:8], "little")


def seeded(params: SamplingParams, run_seed: int, group_id: str) -> SamplingParams:
    """`params` with the group's seed, unless the caller chose one."""
    if params.seed is not None:
        return params
    return replace(params, seed=group_seed(run_seed, group_id))


def token_cost(prompt_token_ids: Sequence[int], params: SamplingParams) -> int:
    """Upper bound of the tokens an engine computes for the group: the prompt once, every sample in full."""
    return len(prompt_token_ids) + params.n * params.max_tokens


def encode_prompts(tokenizer: Any, prompts: Sequence[Prompt], vocab_size: int, max_model_len: int) -> list[list[int]]:
    """Token ids of each prompt; ValueError names the prompt that is empty, too long or out of the vocabulary."""
    return [_encode_prompt(tokenizer, i, prompt, vocab_size, max_model_len) for i, prompt in enumerate(prompts)]


def _encode_prompt(tokenizer: Any, position: int, prompt: Prompt, vocab_size: int, max_model_len: int) -> list[int]:
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


def per_prompt_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One SamplingParams for each prompt, from one for all, a list, or None for the defaults."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    return _one_per_prompt("params", params, num_prompts, SamplingParams)


def per_prompt_metadata(metadata: Sequence[Mapping[str, Any]] | None, num_prompts: int) -> list[Mapping[str, Any]]:
    """One mapping for each prompt, handed through to its rollouts untouched."""
    if metadata is None:
        return [{} for _ in range(num_prompts)]
    return _one_per_prompt("metadata", metadata, num_prompts, Mapping)


def per_prompt_group_ids(group_ids: Sequence[str] | None, num_prompts: int) -> list[str | None]:
    """The caller's id of each group; None where the coordinator shall give the next free one."""
    if group_ids is None:
        return [None] * num_prompts
    checked = _one_per_prompt("group_ids", group_ids, num_prompts, str)
    for group_id, count in Counter(checked).items():
        if count > 1:
            raise ValueError(f"group_ids must be unique within a call: {group_id!r} is given {count} times")
    return checked


def _one_per_prompt(name: str, values: Any, num_prompts: int, kind: type) -> list[Any]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list with one {kind.__name__} for each prompt, got {type(values).__name__}")
    if len(values) != num_prompts:
        raise ValueError(f"{name} has {len(values)} entries for {num_prompts} prompts: give one for each prompt")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise ValueError(f"{name}[{i}] must be a {kind.__name__}, got {type(value).__name__}")
    return list(values)
