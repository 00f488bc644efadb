"""Loads: what arrives when. A load is the same list of arrivals for every loop that it is given to."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from engine import SamplingParams

Kind = Literal["chat", "document"]

VOCAB_SIZE = 49152
CHAT_TOKENS, CHAT_NEW_TOKENS = 64, 32
DOCUMENT_TOKENS = 4096
DOCUMENT_SHARE = 0.5  # of the capacity: what documents alone would keep the machine busy for
CHAT_SHARE = 0.3  # the same for chats, if they came by the batch


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request and when it comes."""

    seconds: float  # after the start
    kind: Kind
    prompt_token_ids: list[int]
    params: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Arrivals in order of time."""

    title: str
    arrivals: Sequence[Arrival]
    num_requests: int  # as a caller counts them: a group is one
    watched: Kind = "chat"  # whose tokens the latencies are about

    def without_groups(self) -> Load:
        """Every sample as a request of its own, which knows nothing of the others."""
        return replace(self, arrivals=[one for arrival in self.arrivals for one in _samples(arrival)])


def stream(seconds: float, chats_per_second: float, documents_per_second: float, seed: int) -> Load:
    """A Poisson stream of chats in which every so-manieth request is a document."""
    draw, distance = random.Random(seed), 1 + round(chats_per_second / documents_per_second)
    arrivals: list[Arrival] = []
    for place, at in enumerate(_poisson(draw, documents_per_second * distance, seconds)):
        if place % distance == distance // 2:
            arrivals.append(_arrival(draw, at, "document", DOCUMENT_TOKENS, CHAT_NEW_TOKENS))
        else:
            arrivals.append(_arrival(draw, at, "chat", CHAT_TOKENS, CHAT_NEW_TOKENS))
    num_documents = sum(arrival.kind == "document" for arrival in arrivals)
    title = (
        f"(a) a Poisson stream, {len(arrivals)} requests in {seconds:.0f} s: {len(arrivals) - num_documents} chats of "
        f"{CHAT_TOKENS} + {CHAT_NEW_TOKENS} tokens ({CHAT_SHARE:.0%} of the capacity), {num_documents} documents of "
        f"{DOCUMENT_TOKENS} + {CHAT_NEW_TOKENS} ({DOCUMENT_SHARE:.0%}); latencies of chats"
    )
    return Load(title=title, arrivals=arrivals, num_requests=len(arrivals))


def groups(num_prompts: int, group_size: int, max_tokens: int, prompt_length: int, seed: int) -> Load:
    """Prompts with several samples each, all at once."""
    draw = random.Random(seed)
    arrivals = [_arrival(draw, 0.0, "document", prompt_length, max_tokens, n=group_size) for _ in range(num_prompts)]
    title = f"(b) {num_prompts} prompts of {prompt_length} tokens x {group_size} samples x {max_tokens} tokens"
    return Load(title=title, arrivals=arrivals, num_requests=num_prompts, watched="document")


def burst(num_requests: int, prompt_length: int, max_tokens: int, seed: int) -> Load:
    """Distinct requests, all at once."""
    draw = random.Random(seed)
    arrivals = [_arrival(draw, 0.0, "chat", prompt_length, max_tokens) for _ in range(num_requests)]
    title = f"(c) {num_requests} requests of {prompt_length} + {max_tokens} tokens"
    return Load(title=title, arrivals=arrivals, num_requests=num_requests)


def _poisson(draw: random.Random, per_second: float, seconds: float) -> Iterator[float]:
    at = draw.expovariate(per_second)
    while at < seconds:
        yield at
        at += draw.expovariate(per_second)


def _arrival(draw: random.Random, at: float, kind: Kind, prompt_length: int, max_tokens: int, n: int = 1) -> Arrival:
    params = SamplingParams(n=n, max_tokens=max_tokens, ignore_eos=True, seed=draw.randrange(2**32))
    prompt = [draw.randrange(3, VOCAB_SIZE) for _ in range(prompt_length)]
    return Arrival(seconds=at, kind=kind, prompt_token_ids=prompt, params=params)


def _samples(arrival: Arrival) -> Iterator[Arrival]:
    params = arrival.params
    assert params.seed is not None, "arrivals are made with seeds"
    for index in range(params.n):
        yield replace(arrival, params=replace(params, n=1, seed=params.seed + index))
