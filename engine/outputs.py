"""Outputs: what the engine hands back, token by token and when a sample is finished."""

from __future__ import annotations

from dataclasses import dataclass, field
from time import monotonic
from typing import Literal

from engine.timing import RequestTiming, RequestTotals, StepSeconds

FinishReason = Literal["stop", "length", "abort"]
UpdateMode = Literal["recompute", "keep", "wait", "abort"]  # of running requests, when the weights change


@dataclass(slots=True, kw_only=True)
class Completion:
    """One finished sample of a request; the lists have one entry per generated token."""

    request_id: str
    index: int  # which of the request's n samples
    token_ids: list[int]  # with the token that stopped it
    logprobs: list[float]  # each exactly a float32, under the distribution the token was drawn from
    policy_versions: list[int]  # the weights each token was drawn under
    finish_reason: FinishReason
    stop_reason: int | str | None  # the stop token id or stop string; None for an end token, length and abort
    text: str  # without the stop string or stop token; "" where the engine has no tokenizer
    is_exact: bool  # False where a token was drawn on keys and values of older weights
    # where more than a temperature changes the distribution; else None
    raw_logprobs: list[float] | None = None  # each exactly a float32, under the model's own distribution
    kept_mass: list[float] | None = None  # share of the distribution before truncation that could be drawn
    # where `logprobs=k` asks for it: the k likeliest token ids and the drawn one, under the distribution drawn from
    top_logprobs: list[dict[int, float]] | None = None
    # where `prompt_logprobs=k` asks for it: by prompt token (None for the first) the k likeliest token ids and the
    # prompt's own, under the model's own distribution; an aborted one has as many as were computed
    prompt_logprobs: list[dict[int, float] | None] | None = None
    # no part of the result, so two completions are equal whenever they were made
    timing: RequestTiming | None = field(default=None, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class TokenDetail:
    """What is known of a token that was drawn from written-out logits; a Completion shows what was asked for."""

    raw_logprob: float
    kept_mass: float
    top_logprobs: dict[int, float]


@dataclass(slots=True)
class NewToken:
    """One token drawn in a step."""

    request_id: str
    index: int
    token_id: int
    logprob: float
    policy_version: int


@dataclass(slots=True, kw_only=True)
class StepOutput:
    """What one engine step gave, in the order of the running requests."""

    new_tokens: list[NewToken] = field(default_factory=list)
    finished: list[Completion] = field(default_factory=list)
    time: float = field(default_factory=monotonic, compare=False)  # at which it was taken in, by `time.monotonic`

    def extend(self, later: StepOutput) -> None:
        self.new_tokens += later.new_tokens
        self.finished += later.finished
        self.time = later.time


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """What a change of weights did."""

    checksum: bytes  # 16 bytes that name the new weights
    num_recomputed_tokens: int  # whose KV running requests dropped and compute again


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """The engine's gauges and, from `num_preemptions` on, its counters since it was built."""

    num_requests_running: int  # samples that hold blocks, or wait for their group's prompt to be computed
    num_requests_waiting: int  # samples in the queue
    num_blocks: int
    num_free_blocks: int
    kv_cache_usage: float  # 0..1
    num_preemptions: int
    prefix_cache_queries: int  # tokens looked up
    prefix_cache_hits: int  # tokens found
    prefix_cache_hit_rate: float  # 0..1
    num_steps: int
    num_scheduled_tokens: int
    num_generated_tokens: int
    num_evictions: int  # cached blocks that were given to others
    requests: RequestTotals
    step_seconds: StepSeconds
    policy_version: int
