"""Chunks, caches, preemption, blocks, threads: no decision about how a request is run shows in its bits."""

from __future__ import annotations

import itertools
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from exactness_checks import (
    NEEDLE,
    PROMPT_LENGTH,
    Requests,
    Setting,
    all_bits,
    alone,
    bits,
    bits_by_sample,
    drain,
    make_engine,
    prompt_of,
    random_mates,
    run,
    run_one,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import kernels
from engine import LLMEngine, SamplingParams

pytestmark = pytest.mark.usefixtures("two_threads_afterwards")


def test_every_chunk_size_gives_the_same_bits(tiny_setting: Setting) -> None:
    expected = alone(tiny_setting)
    for chunk in range(1, PROMPT_LENGTH + 2):
        assert alone(tiny_setting, max_num_batched_tokens=chunk) == expected, f"chunks of {chunk} tokens"


@pytest.mark.parametrize("chunk", [1, 7, 16, 30])
def test_chunked_prefill_of_a_long_prompt_crosses_attention_chunks(setting: Setting, chunk: int) -> None:
    whole = run_one(make_engine(setting), prompt_of(3, 300))
    cut = run_one(make_engine(setting, long_prefill_token_threshold=chunk), prompt_of(3, 300))
    assert bits(cut) == bits(whole)


def test_a_hot_prefix_cache_gives_the_bits_of_a_cold_one(setting: Setting) -> None:
    engine = make_engine(setting)
    cold = run_one(engine, prompt_of(0))
    hot = run_one(engine, prompt_of(0))
    assert engine.stats().prefix_cache_hits >= 32
    assert bits(hot) == bits(cold) == alone(setting, enable_prefix_caching=False)


@pytest.mark.parametrize("num_blocks", [8, 11, 16])
def test_preempted_requests_give_the_bits_of_undisturbed_ones(setting: Setting, num_blocks: int) -> None:
    requests = {f"r{i}": (prompt_of(i, 40), SamplingParams(max_tokens=40, seed=i, ignore_eos=True)) for i in range(4)}
    tight = make_engine(setting, num_blocks=num_blocks)
    squeezed = run(tight, requests)
    assert tight.stats().num_preemptions > 0
    assert tight.stats().num_free_blocks == num_blocks
    assert all_bits(squeezed) == all_bits(run(make_engine(setting), requests))


def groups_with_a_common_prefix() -> Requests:
    """Four groups of three; the second and the fourth prompt begin as the first does."""
    return {
        f"g{i}": (
            prompt_of(0, 32) + prompt_of(i, 11 + i) if i % 2 else prompt_of(i, 43),
            SamplingParams(n=3, max_tokens=24, seed=i, temperature=0.8, ignore_eos=True),
        )
        for i in range(4)
    }


def test_preemption_chunks_cache_and_threads_in_every_combination(tiny_setting: Setting) -> None:
    requests = groups_with_a_common_prefix()
    expected = all_bits(run(make_engine(tiny_setting, enable_prefix_caching=False), requests))
    seen_preemptions = {}
    for options in itertools.product((13, 600), (2048, 29, 5), (True, False), (1, 3)):
        num_blocks, chunk, is_caching, num_threads = options
        engine = make_engine(
            tiny_setting, num_blocks=num_blocks, max_num_batched_tokens=chunk, enable_prefix_caching=is_caching,
            num_threads=num_threads,
        )  # fmt: skip
        assert all_bits(run(engine, requests)) == expected, options
        seen_preemptions[options] = engine.stats().num_preemptions > 0
        assert is_caching == (engine.stats().prefix_cache_hits > 0), options
    assert all(is_preempted == (options[0] == 13) for options, is_preempted in seen_preemptions.items())


@pytest.mark.parametrize("block_size", [32, 48, 256])
def test_the_block_size_does_not_show(setting: Setting, block_size: int) -> None:
    assert alone(setting, block_size=block_size, num_blocks=40) == alone(setting)


def test_other_physical_blocks_give_the_same_bits(tiny_setting: Setting) -> None:
    """Requests that come and go in between leave the needle with blocks in an order of their own."""
    tables, results = set(), set()
    for num_earlier in (0, 3, 7, 12):
        engine = make_engine(tiny_setting, num_blocks=64, enable_prefix_caching=num_earlier % 2 == 0)
        run(engine, random_mates(num_earlier, seed=9 + num_earlier))
        engine.add_request("needle", prompt_of(0), NEEDLE)
        engine.step()
        tables.add(tuple(engine.scheduler.running[0].block_ids))
        results.add(repr(bits(drain(engine, ["needle"])["needle"][0])))
    assert len(tables) == 4
    assert any(list(table) != sorted(table) for table in tables)
    assert results == {repr(alone(tiny_setting))}


def test_what_unused_slots_hold_does_not_show(tiny_setting: Setting) -> None:
    """Before each step NaN is put into every slot that no request has filled and the prefix cache does not offer."""
    requests = {**groups_with_a_common_prefix(), "needle": (prompt_of(0), NEEDLE)}
    expected = run(make_engine(tiny_setting), requests)
    engine = make_engine(tiny_setting, num_blocks=16, max_num_batched_tokens=50)
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    done, num_poisoned = [], 0
    while engine.has_unfinished():
        num_poisoned += poison_unused_slots(engine)
        done += engine.step().finished
    assert bits_by_sample(done) == bits_by_sample(itertools.chain(*expected.values()))
    assert engine.stats().num_preemptions > 0
    assert engine.stats().prefix_cache_hits > 0
    assert num_poisoned > 1000


def poison_unused_slots(engine: LLMEngine) -> int:
    """Writes NaN over whatever a step must not read; how many slots that were."""
    runner, pool = engine.model_runner, engine.scheduler.block_pool
    is_used = torch.zeros(pool.num_blocks, pool.block_size, dtype=torch.bool)
    is_used[list(pool._block_of_hash.values())] = True
    for request in engine.scheduler.running:
        for index, block_id in enumerate(request.block_ids):
            num_filled = min(request.num_computed_tokens - index * pool.block_size, pool.block_size)
            is_used[block_id, :num_filled] = True
    runner.key_blocks.masked_fill_(~is_used[None, :, None, None, :], float("nan"))
    runner.value_blocks.masked_fill_(~is_used[None, :, None, :, None], float("nan"))
    return int((~is_used).sum())


def test_the_poison_is_seen_where_it_must_be(tiny_setting: Setting) -> None:
    """The control: NaN in a slot that is in use comes out."""
    engine = make_engine(tiny_setting)
    engine.add_request("needle", prompt_of(0), NEEDLE)
    engine.step()
    engine.model_runner.key_blocks[:, engine.scheduler.running[0].block_ids[0], :, :, 3] = float("nan")
    assert bits(drain(engine, ["needle"])["needle"][0]) != alone(tiny_setting)


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 5, 6, 7])
def test_the_number_of_threads_does_not_show(setting: Setting, num_threads: int) -> None:
    expected = run(make_engine(setting), random_mates(5, seed=1))
    got = run(make_engine(setting, num_threads=num_threads), random_mates(5, seed=1))
    assert kernels.get_num_threads() == num_threads
    assert all_bits(got) == all_bits(expected)


def test_a_process_that_hogs_the_cores_does_not_show(setting: Setting) -> None:
    expected = run(make_engine(setting), random_mates(5, seed=2))
    with hogged_cores():
        got = run(make_engine(setting), random_mates(5, seed=2))
    assert all_bits(got) == all_bits(expected)


@contextmanager
def hogged_cores() -> Iterator[None]:
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(2)]
    try:
        yield
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()


SCHEDULES = st.fixed_dictionaries(
    {
        "max_num_batched_tokens": st.integers(1, 200),
        "long_prefill_token_threshold": st.sampled_from([0, 1, 3, 16, 50]),
        "num_blocks": st.integers(12, 60),  # the largest request needs ten
        "block_size": st.sampled_from([16, 32, 48]),
        "num_threads": st.integers(1, 4),
        "enable_prefix_caching": st.booleans(),
        "max_num_seqs": st.integers(3, 12),
        "async_scheduling": st.booleans(),
        "num_scheduler_steps": st.sampled_from([1, 1, 2, 4]),
    }
)


def test_any_schedule_gives_the_same_bits(tiny_setting: Setting) -> None:
    """Drawn settings of the engine, and requests that arrive, some steps apart, in any order."""
    requests = {**groups_with_a_common_prefix(), **random_mates(3, seed=12), "needle": (prompt_of(0), NEEDLE)}
    each_alone = (run(make_engine(tiny_setting), {name: request})[name] for name, request in requests.items())
    expected = bits_by_sample(itertools.chain(*each_alone))

    @settings(max_examples=18, deadline=None)
    @given(
        options=SCHEDULES,
        order=st.permutations(list(requests)),
        gaps=st.lists(st.integers(0, 9), min_size=len(requests), max_size=len(requests)),
    )
    def check(options, order, gaps):
        engine, done = make_engine(tiny_setting, **options), []
        for request_id, num_steps in zip(order, gaps):
            engine.add_request(request_id, *requests[request_id])
            for _ in range(num_steps):
                done += engine.step().finished
        while engine.has_unfinished():
            done += engine.step().finished
        engine.check_integrity()
        assert bits_by_sample(done) == expected

    check()
