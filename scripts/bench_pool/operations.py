"""Operations: what the coordinator does for a group, what its messages and an engine's take to pack, and a bare call.

All figures but a call's way there and back are of processor time, which others on the machine lengthen little. The
router is timed alone, without Ray, for as many engines as wanted. Prompts are distinct, or all have one beginning
that every engine knows. Messages are packed and unpacked as Ray does it, by cloudpickle.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import psutil
import ray
from ray import cloudpickle

from engine import Completion, SamplingParams
from rollout import cluster
from rollout.coordinator import Placement
from rollout.requests import GroupRequest, GroupResult
from rollout.router import Routed, Router, prefixes_of
from rollout.submission import PendingGroup
from scripts.bench_pool.processes import cpu_seconds, pid_of
from scripts.bench_pool.stub import VOCAB_SIZE

PROMPT_TOKENS = 64
SHARED_TOKENS = 512
BATCH = 64  # groups in a call
NUM_TIMED = 1024  # groups
NUM_CALLS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterCost:
    """Microseconds a group."""

    num_engines: int
    num_running: int  # groups, before the timed ones come
    has_shared_beginning: bool
    reserve: float
    assign: float
    release: float


@dataclass(frozen=True, slots=True, kw_only=True)
class MessageCost:
    """Of one group's share of a message that has BATCH of them."""

    name: str
    num_bytes: float
    pack: float  # microseconds
    unpack: float


@dataclass(frozen=True, slots=True, kw_only=True)
class CallCost:
    """A call of an asynchronous actor on the same node that does nothing; microseconds."""

    round_trip: float  # one after the other
    caller_cpu: float  # of calls that need not wait for each other
    actor_cpu: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Operations:
    """All figures of the section."""

    router: list[RouterCost]
    messages: list[MessageCost]
    driver: dict[str, float]  # microseconds a group
    call: CallCost


def measure(engines: Sequence[int], running: Sequence[int], group_size: int, num_tokens: int) -> Operations:
    """group_size, num_tokens: samples of a group and tokens of a sample, for the messages."""
    cases = itertools.product((False, True), engines, running)
    return Operations(
        router=[router_cost(num_engines, num_running, shared) for shared, num_engines, num_running in cases],
        messages=message_costs(group_size, num_tokens),
        driver=driver_costs(group_size, num_tokens),
        call=call_cost(NUM_CALLS),
    )


def router_cost(num_engines: int, num_running: int, has_shared_beginning: bool) -> RouterCost:
    router = Router(range(num_engines))
    groups = routed_groups(num_running + NUM_TIMED, has_shared_beginning)
    names = router.reserve([None] * num_running)
    router.assign(_named(names, groups))
    seconds = {"reserve": 0.0, "assign": 0.0, "release": 0.0}
    for _ in range(NUM_TIMED // BATCH):
        start = time.thread_time()
        names = router.reserve([None] * BATCH)
        reserved = time.thread_time()
        batch = _named(names, groups)
        named = time.thread_time()
        router.assign(batch)
        assigned = time.thread_time()
        router.release(names)
        seconds["reserve"] += reserved - start
        seconds["assign"] += assigned - named
        seconds["release"] += time.thread_time() - assigned
    return RouterCost(
        num_engines=num_engines,
        num_running=num_running,
        has_shared_beginning=has_shared_beginning,
        **{name: 1e6 * value / NUM_TIMED for name, value in seconds.items()},
    )


def routed_groups(count: int, has_shared_beginning: bool) -> Iterable[Routed]:
    draw = random.Random(0)
    shared = [draw.randrange(VOCAB_SIZE) for _ in range(SHARED_TOKENS)] if has_shared_beginning else []
    for _ in range(count):
        prompt = shared + [draw.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)]
        yield Routed(group_id="", num_tokens=len(prompt) + 512, prefixes=prefixes_of(prompt))


def message_costs(group_size: int, num_tokens: int) -> list[MessageCost]:
    """Every message that one group is part of, but Ray's own parts of them."""
    groups = pending_groups(BATCH, group_size)
    router = Router(range(BATCH))
    router.reserve([group.request.group_id for group in groups])
    assignments = router.assign([group.routed for group in groups])
    placement = Placement(assignments=assignments, engines={}, num_engines=1)
    return [
        _message("reserve, answer", [group.request.group_id for group in groups]),
        _message("assign", [group.routed for group in groups]),
        _message("assign, answer (without actor handles)", placement),
        _message("submit", [group.request for group in groups]),
        _message("collect, answer", results(groups, num_tokens)),
        _message("release", [group.request.group_id for group in groups]),
    ]


def driver_costs(group_size: int, num_tokens: int) -> dict[str, float]:
    """Microseconds a group of what the driver does in Python besides messages."""
    groups = pending_groups(BATCH, group_size)
    answers = results(groups, num_tokens)
    prompts = [group.request.prompt_token_ids for group in groups]
    return {
        "prefixes of the prompt": _microseconds(lambda: [prefixes_of(prompt) for prompt in prompts]),
        "rollouts from the answer": _microseconds(
            lambda: [group.rollouts(result) for group, result in zip(groups, answers, strict=True)]
        ),
    }


def pending_groups(count: int, group_size: int) -> list[PendingGroup]:
    draw, params = random.Random(0), SamplingParams(n=group_size, max_tokens=512, seed=1)
    requests = [
        GroupRequest(
            group_id=f"g{place}",
            prompt_token_ids=[draw.randrange(VOCAB_SIZE) for _ in range(PROMPT_TOKENS)],
            params=params,
        )
        for place in range(count)
    ]
    return [
        PendingGroup(
            position=place, request=request, sampling_params=params, metadata={}, kernel_fingerprint="fingerprint"
        )
        for place, request in enumerate(requests)
    ]


def results(groups: Sequence[PendingGroup], num_tokens: int) -> list[GroupResult]:
    """Answers with drawn tokens and log-probabilities, no two of them alike."""
    draw = random.Random(0)

    def completion(group_id: str, index: int) -> Completion:
        return Completion(
            request_id=group_id,
            index=index,
            token_ids=[draw.randrange(VOCAB_SIZE) for _ in range(num_tokens)],
            logprobs=[-draw.random() for _ in range(num_tokens)],
            policy_versions=[7] * num_tokens,
            finish_reason="length",
            stop_reason=None,
            text="",
            is_exact=True,
        )

    return [
        GroupResult(
            group_id=group.request.group_id,
            completions=[completion(group.request.group_id, index) for index in range(group.request.params.n)],
        )
        for group in groups
    ]


def call_cost(num_calls: int) -> CallCost:
    has_started_ray = cluster.connect(weights_bytes=0, num_cpus=1)
    try:
        return _call_cost(num_calls)
    finally:
        if has_started_ray:
            cluster.disconnect()


def _call_cost(num_calls: int) -> CallCost:
    echo = ray.remote(num_cpus=0)(Echo).remote()
    actor = psutil.Process(ray.get(echo.__ray_call__.remote(pid_of)))
    ray.get([echo.echo.remote(0) for _ in range(num_calls)])
    start = time.perf_counter()
    for number in range(num_calls):
        ray.get(echo.echo.remote(number))
    round_trip = time.perf_counter() - start
    caller, before = time.process_time(), cpu_seconds(actor)
    ray.get([echo.echo.remote(number) for number in range(num_calls)])
    cost = CallCost(
        round_trip=1e6 * round_trip / num_calls,
        caller_cpu=1e6 * (time.process_time() - caller) / num_calls,
        actor_cpu=1e6 * (cpu_seconds(actor) - before) / num_calls,
    )
    ray.kill(echo)
    return cost


class Echo:
    """The least that an actor can do."""

    async def echo(self, value: int) -> int:
        return value


def _named(names: Sequence[str], groups: Iterable[Routed]) -> list[Routed]:
    """The next of `groups`, with these names."""
    return [
        Routed(group_id=name, num_tokens=group.num_tokens, prefixes=group.prefixes)
        for name, group in zip(names, groups)
    ]


def _message(name: str, content: Any) -> MessageCost:
    data = cloudpickle.dumps(content)
    return MessageCost(
        name=name,
        num_bytes=len(data) / BATCH,
        pack=_microseconds(lambda: cloudpickle.dumps(content)),
        unpack=_microseconds(lambda: cloudpickle.loads(data)),
    )


def _microseconds(call: Callable[[], object], num_calls: int = 50) -> float:
    """Of one group's share of a call that is about BATCH of them."""
    call()
    start = time.thread_time()
    for _ in range(num_calls):
        call()
    return 1e6 * (time.thread_time() - start) / num_calls / BATCH
