"""Prompts: the arguments of one call lined up - prompts in a list, one value of everything else for each, and seeds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from engine.sampling_params import SamplingParams
from engine.tokenizer import Prompt


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt (text, ids or messages) or several; ValueError for none at all."""
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], int | Mapping))
    prompts = [prompts] if is_one else list(prompts)
    if not prompts:
        raise ValueError("prompts is empty: give at least one")
    return prompts


def per_prompt_params(
    params: SamplingParams | Sequence[SamplingParams] | None, num_prompts: int
) -> list[SamplingParams]:
    """One SamplingParams for each prompt, from one for all, a list, or None for the defaults."""
    if params is None or isinstance(params, SamplingParams):
        return [params or SamplingParams()] * num_prompts
    return one_per_prompt("params", params, num_prompts, SamplingParams)


def one_per_prompt(name: str, values: Any, num_prompts: int, kind: type) -> list[Any]:
    """`values` as a list, if it has one `kind` for each prompt; ValueError with the argument's name otherwise."""
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise ValueError(f"{name} must be a list with one {kind.__name__} for each prompt, got {type(values).__name__}")
    if len(values) != num_prompts:
        raise ValueError(f"{name} has {len(values)} entries for {num_prompts} prompts: give one for each prompt")
    for i, value in enumerate(values):
        if not isinstance(value, kind):
            raise ValueError(f"{name}[{i}] must be a {kind.__name__}, got {type(value).__name__}")
    return list(values)


def derive_seed(run_seed: int, request_id: str) -> int:
    """64 bits from a run's seed and a request's id, the same wherever and whenever it runs.

    All samples of a request share them; the sample's index goes into the random counter.
    """
    return int.from_bytes(blake2b(run_seed.to_bytes(8, "little") + request_id.encode()).digest()[:8], "little")
