"""What a completion and the engine say of their time adds up, and costs no clock reading for a token."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from engine import Completion, EngineConfig, LLMEngine, SamplingParams

PARAMS = SamplingParams(max_tokens=6, seed=1, ignore_eos=True)
PAUSE = 0.05


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(tiny_model_dir: Callable[..., Path], request: pytest.FixtureRequest) -> LLMEngine:
    return LLMEngine(EngineConfig(str(tiny_model_dir()), num_threads=2, async_scheduling=request.param, max_num_seqs=1))


def finish(engine: LLMEngine) -> list[Completion]:
    done = []
    while engine.has_unfinished():
        done += engine.step().finished
    return done


def test_the_parts_of_a_requests_life_follow_one_another(engine):
    start = time.monotonic()
    engine.add_request("a", [5, 6, 7], PARAMS)
    [completion] = finish(engine)
    timing = completion.timing
    assert min(timing.queue, timing.prefill, timing.decode) >= 0
    assert 0 < timing.end_to_end <= time.monotonic() - start
    assert timing.time_to_first_token == timing.queue + timing.prefill
    assert timing.mean_inter_token == pytest.approx(timing.decode / 5)
    assert timing.num_tokens == 6


def test_waiting_prefilling_and_decoding_are_told_apart(engine):
    engine.add_request("a", [5, 6, 7], PARAMS)
    engine.add_request("b", [5, 6, 7], PARAMS)  # there is one seat
    while not engine.step().new_tokens:
        pass
    time.sleep(PAUSE)
    first, second = finish(engine)
    assert first.timing.queue < PAUSE <= first.timing.decode
    assert second.timing.queue >= PAUSE > second.timing.prefill


def test_a_request_that_never_ran_has_only_waited(engine):
    engine.add_request("a", [5, 6, 7], PARAMS)
    time.sleep(PAUSE)
    [completion] = engine.abort(["a"])
    timing = completion.timing
    assert timing.queue >= PAUSE
    assert (timing.prefill, timing.decode, timing.num_tokens) == (0.0, 0.0, 0)
    assert timing.time_to_first_token is None
    assert timing.mean_inter_token is None


def test_a_resumed_request_counts_the_tokens_drawn_here(engine):
    [[whole]] = engine.generate([[5, 6, 7]], PARAMS)
    columns = {name: getattr(whole, name)[:2] for name in ("token_ids", "logprobs", "policy_versions")}
    engine.add_request("b", [5, 6, 7], PARAMS, resume=replace(whole, finish_reason="abort", **columns))
    [completion] = finish(engine)
    assert len(completion.token_ids) == 6
    assert completion.timing.num_tokens == 4


def test_completions_are_equal_whenever_they_were_made(engine):
    first, second = (engine.generate([[5, 6, 7]], PARAMS)[0][0] for _ in range(2))
    assert first.timing != second.timing
    assert replace(first, request_id="x") == replace(second, request_id="x")
    assert "timing" not in repr(first)


def test_counters_of_requests_and_steps_add_up(engine):
    start = time.monotonic()
    done = [group[0] for group in engine.generate([[5, 6, 7], [8, 9]], PARAMS)]
    engine.add_request("c", [5, 6], PARAMS)
    engine.step()
    engine.abort(["c"])
    elapsed, stats = time.monotonic() - start, engine.stats()
    totals, seconds = stats.requests, stats.step_seconds
    assert (totals.num_finished, totals.num_aborted, totals.num_tokens) == (2, 1, 12)
    assert totals.decode_seconds == pytest.approx(sum(completion.timing.decode for completion in done))
    assert totals.mean_end_to_end == pytest.approx(sum(completion.timing.end_to_end for completion in done) / 2)
    assert totals.mean_time_to_first_token == pytest.approx(sum(c.timing.time_to_first_token for c in done) / 2)
    assert totals.mean_inter_token == pytest.approx(totals.decode_seconds / 10)
    assert 0 < seconds.sample < seconds.execute < elapsed
    assert 0 < seconds.schedule + seconds.prepare + seconds.update < elapsed
    assert stats.num_evictions == 0
    assert engine.stats().requests is not totals, "a snapshot stays as it was"
