"""Every way to run a request against every other: asynchronous, several steps, chunked, cached, preempted, resumed."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness_checks import TINY, prompt_of

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from kernels.profiles import PROFILES

AXES: dict[str, tuple[Any, ...]] = {
    "is_async": (False, True),
    "num_steps": (1, 4),
    "chunk": (2048, 13),
    "is_cached": (False, True),
    "is_preempted": (False, True),
    "is_forked": (True, False),
    "has_mates": (False, True),
    "is_resumed": (False, True),
}
COMMON = {"max_tokens": 14, "temperature": 0.9, "ignore_eos": True}
PARAMS = (
    SamplingParams(seed=1, n=3, **COMMON),
    SamplingParams(
        seed=2, n=2, top_p=0.95, top_k=40, min_p=0.01, repetition_penalty=1.1, frequency_penalty=0.3,
        presence_penalty=-0.2, logit_bias={5: 3.0, 9: -4.0}, allowed_token_ids=range(3, 250), bad_words=["the", "a"],
        logprobs=3, **COMMON,
    ),
    SamplingParams(seed=3, n=2, max_tokens=14, min_tokens=4, stop_token_ids=range(3, 60), top_k=200, prompt_logprobs=0),
    SamplingParams(seed=4, n=2, max_tokens=14, stop=["e", "th"], logprobs=1, prompt_logprobs=3),
    SamplingParams(seed=5, temperature=0.0, repetition_penalty=1.2, max_tokens=14, ignore_eos=True),
)  # fmt: skip
PROMPTS = [prompt_of(seed, length) for seed, length in enumerate((45, 32, 20, 7, 33))]
Groups = list[list[Completion]]


def product() -> list[dict[str, Any]]:
    return [dict(zip(AXES, values, strict=True)) for values in itertools.product(*AXES.values())]


def all_pairs() -> list[dict[str, Any]]:
    """Few combinations in which every two axes meet in all their values."""
    chosen, candidates = [], product()
    missing = {pair for one in candidates for pair in pairs_of(one)}
    while missing:
        best = max(candidates, key=lambda one: len(missing & pairs_of(one)))
        chosen.append(best)
        missing -= pairs_of(best)
    return chosen


def pairs_of(one: Mapping[str, Any]) -> set[tuple]:
    return set(itertools.combinations(one.items(), 2))


def label(one: Mapping[str, Any]) -> str:
    return "-".join(name if value is True else f"{name}{value}" for name, value in one.items() if value is not False)


@pytest.fixture
def model_dir(tiny_model_dir) -> Path:
    return tiny_model_dir("llama", **TINY)


def make_engine(model_dir: Path, numerics: str, **options: Any) -> LLMEngine:
    options = {"num_blocks": 600, "num_threads": 2, "async_scheduling": False, **options}
    return LLMEngine(EngineConfig(str(model_dir), numerics=numerics, **options))


@cache
def expected_groups(model_dir: Path, numerics: str) -> Groups:
    """Each request in an engine that does nothing else, without any of it."""
    return [
        make_engine(model_dir, numerics, enable_prefix_caching=False).generate([prompt], params)[0]
        for prompt, params in zip(PROMPTS, PARAMS, strict=True)
    ]


def words(values: list[float] | None) -> list[int] | None:
    return None if values is None else torch.tensor(values, dtype=torch.float32).view(torch.int32).tolist()


def all_of(completion: Completion) -> tuple:
    """Whatever is reported, as bit patterns."""
    top, prompt = completion.top_logprobs, completion.prompt_logprobs
    return (
        completion.index, completion.token_ids, completion.finish_reason, completion.stop_reason, completion.text,
        words(completion.logprobs), words(completion.raw_logprobs), words(completion.kept_mass),
        None if top is None else [(list(one), words(list(one.values()))) for one in top],
        None if prompt is None else [(list(one), words(list(one.values()))) for one in prompt[1:]],
    )  # fmt: skip


def requests(expected: Groups, combination: Mapping[str, Any]) -> Iterator[tuple[int, dict[str, Any]]]:
    """(number of the group, arguments of add_request without the id); a sample apart has its siblings as finished."""
    for number, group in enumerate(expected):
        begun = [cut(completion, number) for completion in group] if combination["is_resumed"] else []
        if combination["is_forked"]:
            yield number, {"resume": begun[1:]}
            continue
        for one in group:
            others = [replace(other, finish_reason="stop") for other in group if other is not one]
            own = [part for part in begun if part.index == one.index]
            if one not in own:  # a completion of one token has no part to go on from
                yield number, {"resume": [*others, *own]}


def cut(completion: Completion, number: int) -> Completion:
    """The first tokens of a completion, as an abort would have left it."""
    keep = random.Random(number).randrange(1, max(2, len(completion.token_ids) - 1))
    columns = ("token_ids", "logprobs", "policy_versions", "raw_logprobs", "kept_mass", "top_logprobs")
    shorter = {name: getattr(completion, name) for name in columns}
    shorter = {name: column if column is None else column[:keep] for name, column in shorter.items()}
    if keep >= len(completion.token_ids):
        return completion
    return replace(completion, finish_reason="abort", stop_reason=None, text="", **shorter)


def check(model_dir: Path, numerics: str, combination: Mapping[str, Any]) -> None:
    expected = expected_groups(model_dir, numerics)
    engine = make_engine(
        model_dir,
        numerics,
        async_scheduling=combination["is_async"],
        num_scheduler_steps=combination["num_steps"],
        max_num_batched_tokens=combination["chunk"],
        num_blocks=9 if combination["is_preempted"] else 600,
        max_num_seqs=12,
    )
    if combination["is_cached"]:
        engine.generate(PROMPTS, SamplingParams(max_tokens=1))
    if combination["has_mates"]:
        for mate in range(6):
            params = SamplingParams(max_tokens=5 + mate, seed=mate, n=1 + mate % 2, top_k=4 * (mate % 3))
            engine.add_request(f"mate-{mate}", prompt_of(100 + mate, 5 * mate + 1), params)
    group_of = {}
    for place, (number, arguments) in enumerate(requests(expected, combination)):
        group_of[f"r{place}"] = number
        engine.add_request(f"r{place}", PROMPTS[number], PARAMS[number], **arguments)
    done: dict[int, list[Completion]] = {number: [] for number in range(len(expected))}
    for number in itertools.count():
        for completion in engine.step().finished:
            if completion.request_id in group_of:
                done[group_of[completion.request_id]].append(completion)
        if not engine.has_unfinished():
            break
        if combination["is_preempted"] and number % 6 == 5 and engine.scheduler.running:
            engine.scheduler._preempt_tail()  # whatever the pool's size does by itself
        engine.check_integrity()
    for number, group in enumerate(expected):
        known = {} if not combination["is_resumed"] else {c.index: c for c in group if cut(c, number) is c}
        got = {all_of(completion)[0]: all_of(completion) for completion in done[number]}
        assert len(got) == len(done[number]), "a sample came twice"
        assert {**{index: all_of(c) for index, c in known.items()}, **got} == {c.index: all_of(c) for c in group}
    stats = engine.stats()
    assert stats.num_free_blocks == stats.num_blocks
    if combination["is_preempted"]:
        assert stats.num_preemptions > 0
    if combination["is_cached"]:
        assert stats.prefix_cache_hits > 0


@pytest.mark.parametrize("combination", all_pairs(), ids=label)
def test_every_pair_of_ways_to_run_gives_the_same_bits(model_dir, combination):
    check(model_dir, "float32", combination)


@pytest.mark.slow
@pytest.mark.parametrize("numerics", PROFILES)
def test_every_combination_of_ways_to_run_gives_the_same_bits(model_dir, numerics):
    for combination in product():
        check(model_dir, numerics, combination)


def test_all_pairs_meet():
    chosen = all_pairs()
    assert len(chosen) < 20
    for (one, ones), (other, others) in itertools.combinations(AXES.items(), 2):
        assert {(c[one], c[other]) for c in chosen} == set(itertools.product(ones, others))
