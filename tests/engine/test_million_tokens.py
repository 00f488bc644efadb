"""A million sampled tokens: random schedules, each request alone, and the trainer's forward give the same bits.

Engines of random settings (step budget, chunk limit, pool, block size, seats, threads, prefix cache, asynchronous or
not, steps of a cycle) serve random requests (prompts, some with common beginnings; group sizes, temperatures, lengths,
priorities) that arrive at random times and are now and then aborted. Every sample that comes out is compared, tokens
and bits of log-probabilities, with

- its request alone: nothing else in the engine, no prefix cache, one thread, and a budget of one token, so that every
  step computes one row;
- the trainer's forward over its whole group, packed with a shared prompt.

The samples of a request keep their company in neither: with a budget of one, they take their steps one after another.
Of an aborted sample, the tokens it had are compared with as many of the sample alone.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
from exactness_checks import (
    Requests,
    Setting,
    bits,
    float_bits,
    group_logprobs,
    load_trainer_model,
    make_engine,
    prompt_of,
    run,
)

import kernels
from engine import Completion, LLMEngine, SamplingParams
from engine.model import Transformer

TOKENS_PER_PROFILE = 333_334
REQUESTS_PER_ENGINE = 40
LONGEST_PROMPT, LONGEST_COMPLETION = 300, 200

pytestmark = pytest.mark.usefixtures("two_threads_afterwards")


@pytest.mark.slow
@pytest.mark.timeout(7200)
def test_a_million_tokens_of_random_schedules_equal_each_request_alone_and_the_trainer(
    tiny_setting: Setting, capsys: pytest.CaptureFixture[str]
) -> None:
    draw, tally, budgets = random.Random(tiny_setting.numerics), Counter(), set()
    alone, trainer = engine_of_one_row(tiny_setting), load_trainer_model(tiny_setting)
    while tally["tokens"] < TOKENS_PER_PROFILE:
        options = random_options(draw)
        engine, requests = make_engine(tiny_setting, **options), random_requests(draw)
        groups = run_at_random(engine, requests, draw)
        kernels.set_num_threads(1)
        for name, (prompt, params) in requests.items():
            check_against_the_request_alone(alone, prompt, params, groups[name])
            check_against_the_trainer(trainer, prompt, params, groups[name])
        budgets.add(options["max_num_batched_tokens"])
        count(tally, engine, options, groups)
    assert alone.stats().num_steps == alone.stats().num_scheduled_tokens  # one row in each
    assert alone.stats().num_preemptions == alone.stats().prefix_cache_hits == 0
    assert min(tally[name] for name in ("preemptions", "hits", "aborted", "threads_1", "threads_4")) > 0
    with capsys.disabled():
        print(f"\n{tiny_setting.numerics}: {dict(sorted(tally.items()))}, {len(budgets)} step budgets")
        print(f"alone: {alone.stats().num_steps} steps of one row; 0 bits differ")


def engine_of_one_row(setting: Setting) -> LLMEngine:
    return make_engine(
        setting, max_num_batched_tokens=1, enable_prefix_caching=False, num_threads=1, async_scheduling=False
    )


def random_options(draw: random.Random) -> dict[str, Any]:
    """A pool from just enough for the longest request to some four times that."""
    block_size = draw.choice([16, 16, 32, 48])
    fewest_blocks = -(-(LONGEST_PROMPT + LONGEST_COMPLETION) // block_size) + 8
    return {
        "block_size": block_size,
        "num_blocks": draw.randrange(fewest_blocks, 4 * fewest_blocks),
        "max_num_batched_tokens": int(2 ** draw.uniform(2, 11)),
        "long_prefill_token_threshold": draw.choice([0, 0, 1, 5, 16, 33, 100]),
        "max_num_seqs": draw.randrange(8, 100),
        "num_threads": draw.randrange(1, 5),
        "enable_prefix_caching": draw.random() < 0.7,
        "async_scheduling": draw.random() < 0.5,
        "num_scheduler_steps": draw.choice([1, 1, 2, 5]),
    }


def random_requests(draw: random.Random) -> Requests:
    common = prompt_of(draw.randrange(10**9), 200)
    requests = {}
    for number in range(REQUESTS_PER_ENGINE):
        prompt = prompt_of(draw.randrange(10**9), draw.randrange(1, 60 if draw.random() < 0.9 else LONGEST_PROMPT))
        if draw.random() < 0.3:
            prompt = common[: draw.randrange(1, 200 if draw.random() < 0.2 else 60)] + prompt
        params = SamplingParams(
            n=draw.choice([1, 1, 1, 2, 4, 8]), seed=draw.randrange(2**64),
            temperature=draw.choice([0.0, 0.5, 0.8, 1.0, 1.0, 1.3]), ignore_eos=draw.random() < 0.7,
            max_tokens=draw.randrange(1, LONGEST_COMPLETION + 1),
        )  # fmt: skip
        requests[f"r{number}"] = prompt[:LONGEST_PROMPT], params
    return requests


def run_at_random(engine: LLMEngine, requests: Requests, draw: random.Random) -> dict[str, list[Completion]]:
    """Completions by request, the aborted ones with what they had."""
    waiting, done = list(requests.items()), []
    rate = draw.choice([0.05, 0.3, 3.0])  # arrivals per step
    unfinished: Counter[str] = Counter()
    while waiting or unfinished:
        for _ in range(min(len(waiting), int(rate + draw.random()))):
            name, request = waiting.pop()
            engine.add_request(name, *request, priority=draw.randrange(2))
            unfinished[name] = request[1].n
        finished = engine.step().finished
        if unfinished and draw.random() < 0.002:
            finished = finished + abort_one(engine, unfinished, finished, draw)
        done += finished
        unfinished = +(unfinished - Counter(completion.request_id for completion in finished))
    engine.check_integrity()
    return {name: [completion for completion in done if completion.request_id == name] for name in requests}


def abort_one(
    engine: LLMEngine, unfinished: Counter[str], finished: list[Completion], draw: random.Random
) -> list[Completion]:
    """Ends one of the requests that the last step has not finished, if there is one."""
    names = sorted(unfinished - Counter(completion.request_id for completion in finished))
    return engine.abort([draw.choice(names)]) if names else []


def check_against_the_request_alone(
    alone: LLMEngine, prompt: list[int], params: SamplingParams, completions: list[Completion]
) -> None:
    expected = run(alone, {"alone": (prompt, params)})["alone"]
    assert sorted(completion.index for completion in completions) == list(range(params.n))
    for completion in completions:
        token_ids, logprobs = bits(expected[completion.index])
        if completion.finish_reason == "abort":
            length = len(completion.token_ids)
            token_ids, logprobs = token_ids[:length], logprobs[:length]
        assert bits(completion) == (token_ids, logprobs), completion


def check_against_the_trainer(
    model: Transformer, prompt: list[int], params: SamplingParams, completions: list[Completion]
) -> None:
    completions = [completion for completion in completions if completion.token_ids]
    if completions:
        expected = group_logprobs(model, prompt, completions, params.logprob_temperature)
        for completion, logprobs in zip(completions, expected, strict=True):
            assert float_bits(logprobs) == float_bits(completion.logprobs), completion


def count(tally: Counter[str], engine: LLMEngine, options: dict[str, Any], groups: dict[str, list[Completion]]) -> None:
    samples = [completion for group in groups.values() for completion in group]
    stats = engine.stats()
    tally["tokens"] += sum(len(completion.token_ids) for completion in samples)
    tally["requests"] += len(groups)
    tally["samples"] += len(samples)
    tally["aborted"] += sum(completion.finish_reason == "abort" for completion in samples)
    tally["engines"] += 1
    tally[f"threads_{options['num_threads']}"] += 1
    tally["steps"] += stats.num_steps
    tally["preemptions"] += stats.num_preemptions
    tally["hits"] += stats.prefix_cache_hits
