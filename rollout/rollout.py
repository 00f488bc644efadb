"""Rollout: one finished sample, with everything a trainer needs to learn from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from engine import RequestTiming, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Rollout:
    """One sample of one prompt; the lists with one entry per completion token are as long as `token_ids`."""

    group_id: str  # names the prompt within the run; its samples share it
    index: int  # place of the sample in its group
    prompt_token_ids: list[int]
    token_ids: list[int]  # completion only, the stop token included
    logprobs: list[float]  # one float32 per completion token, of the distribution sampled from
    policy_versions: list[int]  # the version each completion token was drawn under, stamped by the engine
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: int | str | None  # the stop token id or stop string that ended it
    text: str
    loss_mask: list[int]  # 1 for every completion token to learn from
    seed: int  # 64 bit; random numbers are keyed by (seed, index, position)
    sampling_params: SamplingParams
    is_exact: bool  # False: some token was drawn on KV of an older version (weights updated with mode="keep")
    kernel_fingerprint: str
    metadata: Mapping[str, Any]
    # where more than a temperature changes the distribution; else None
    raw_logprobs: list[float] | None = None  # one float32 per completion token, of the model's own distribution
    kept_mass: list[float] | None = None  # share of the distribution before truncation that could be drawn
    # where `logprobs=k` asks for it: the k likeliest token ids and the drawn one, of the distribution sampled from
    top_logprobs: list[dict[int, float]] | None = None
    # where `prompt_logprobs=k` asks for it: the same of each prompt token (None for the first), of the model's own
    prompt_logprobs: list[dict[int, float] | None] | None = None
    # no part of the result, so two rollouts are equal however long they took; of the engine that finished the sample
    timing: RequestTiming | None = field(default=None, compare=False, repr=False)
