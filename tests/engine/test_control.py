"""Pausing, resuming, going on from partial completions, and weights that change under running requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness_checks import (
    Setting,
    all_bits,
    bits,
    drain,
    make_engine,
    perturbed,
    prompt_of,
    run,
    run_one,
)

from engine import Completion, LLMEngine, SamplingParams

PARAMS = SamplingParams(max_tokens=16, seed=1, ignore_eos=True)


@pytest.fixture
def setting(tiny_model_dir: Callable[..., Path]) -> Setting:
    from exactness_checks import TINY

    return Setting(tiny_model_dir("llama", **TINY), "float32")


@pytest.fixture(params=[False, True], ids=["sync", "async"])
def engine(setting: Setting, request: pytest.FixtureRequest) -> LLMEngine:
    return make_engine(setting, async_scheduling=request.param)


@pytest.fixture
def expected(setting: Setting) -> Completion:
    return run_one(make_engine(setting, async_scheduling=False), prompt_of(0), PARAMS)


def step_times(engine: LLMEngine, count: int) -> list[Completion]:
    return [completion for _ in range(count) for completion in engine.step().finished]


# Pause


def test_a_kept_request_stands_still_and_goes_on_with_the_same_bits(engine, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 4)
    assert engine.pause("keep") == []
    assert engine.is_paused
    engine.step()  # hands out what the step under way had drawn
    num_generated = engine.stats().num_generated_tokens
    assert not engine.can_step()
    assert engine.step().new_tokens == []
    assert engine.stats().num_generated_tokens == num_generated < 16
    assert engine.has_unfinished()
    engine.resume()
    assert bits(drain(engine, ["a"])["a"][0]) == bits(expected)


def test_waiting_finishes_what_has_begun_and_nothing_else(engine, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 2)
    engine.pause("wait")
    engine.add_request("later", prompt_of(1), PARAMS)
    done = []
    while engine.can_step():
        done += engine.step().finished
    assert [completion.request_id for completion in done] == ["a"]
    assert bits(done[0]) == bits(expected)
    assert engine.stats().num_requests_waiting == 1
    engine.resume()
    assert [completion.request_id for completion in drain(engine, ["later"])["later"]] == ["later"]


def test_aborting_pause_hands_back_what_there_is(engine, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 5)
    engine.add_request("queued", prompt_of(1), replace(PARAMS, n=2))
    ended = engine.pause("abort")
    assert [(c.request_id, c.index, c.finish_reason) for c in ended] == [
        ("a", 0, "abort"),
        ("queued", 0, "abort"),
        ("queued", 1, "abort"),
    ]
    assert 5 <= len(ended[0].token_ids) < 16
    assert ended[0].token_ids == expected.token_ids[: len(ended[0].token_ids)]
    engine.check_integrity()
    assert engine.stats().num_free_blocks == engine.stats().num_blocks


def test_requests_may_be_added_and_aborted_while_paused(engine):
    engine.pause()
    engine.add_request("a", prompt_of(0), PARAMS)
    assert not engine.can_step()
    assert engine.step().finished == []
    assert [c.token_ids for c in engine.abort(["a"])] == [[]]
    with pytest.raises(ValueError, match=r"paused.*resume"):
        engine.generate([[5, 6]])
    engine.resume()
    assert len(engine.generate([[5, 6]])[0]) == 1


def test_pause_and_resume_refuse_what_they_do_not_know(engine):
    with pytest.raises(ValueError, match="mode='stop' must be 'keep', 'wait' or 'abort'"):
        engine.pause("stop")
    with pytest.raises(ValueError, match="not paused"):
        engine.resume()


def test_an_abort_counts_what_has_finished_but_was_not_handed_out_yet(engine):
    engine.add_request("a", prompt_of(0), replace(PARAMS, max_tokens=1))
    engine.add_request("b", prompt_of(1), PARAMS)
    engine._launch_steps()
    engine.pause()  # takes in the step that finishes "a"
    assert [c.request_id for c in engine.abort(["a", "b"])] == ["b"]
    assert [c.request_id for c in engine.step().finished] == ["a"]
    with pytest.raises(ValueError, match=r"\['a'\]"):
        engine.abort(["a"])


# Going on from a partial completion


def cut(completion: Completion, keep: int) -> Completion:
    columns = {name: getattr(completion, name)[:keep] for name in ("token_ids", "logprobs", "policy_versions")}
    return replace(completion, finish_reason="abort", **columns)


@pytest.mark.parametrize("keep", [1, 7, 15])
def test_a_resumed_request_ends_with_the_bits_of_one_never_interrupted(setting, expected, keep):
    other = make_engine(setting, max_num_batched_tokens=20)
    other.add_request("b", prompt_of(0), PARAMS, resume=cut(expected, keep))
    resumed = drain(other, ["b"])["b"][0]
    assert bits(resumed) == bits(expected)
    assert resumed.policy_versions == expected.policy_versions
    assert other.stats().num_generated_tokens == 16 - keep


def test_an_aborted_request_goes_on_elsewhere(engine, setting, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 6)
    [partial] = engine.abort(["a"])
    assert bits(run_resumed(make_engine(setting), partial)) == bits(expected)


def run_resumed(engine: LLMEngine, partial: Completion) -> Completion:
    engine.add_request("b", prompt_of(0), PARAMS, resume=partial)
    return drain(engine, ["b"])["b"][0]


def test_the_unfinished_samples_of_a_group_go_on_and_the_finished_stay_as_they_are(setting):
    params = replace(PARAMS, n=4)
    whole = run(make_engine(setting), {"g": (prompt_of(0), params)})["g"]
    engine = make_engine(setting)
    engine.add_request("g", prompt_of(0), params, resume=[cut(whole[1], 3), whole[2], cut(whole[3], 0)])
    assert [bits(c) for c in drain(engine, ["g"])["g"]] == [bits(whole[i]) for i in (0, 1, 3)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"index": 1}, "sample 1 of request 'b' twice, or it has only n=1"),
        ({"logprobs": [0.0]}, "4 token_ids, 1 logprobs and 4 policy_versions"),
        ({"token_ids": [5, 6, 7, 320]}, "token id 320, outside the vocabulary of 320"),
        ({"token_ids": [5] * 16, "logprobs": [0.0] * 16, "policy_versions": [0] * 16}, "max_tokens=16 .* allow 16"),
        ({"finish_reason": "stop"}, "nothing is left to draw"),
    ],
)
def test_a_completion_that_cannot_be_resumed_is_refused(engine, expected, change, message):
    with pytest.raises(ValueError, match=message):
        engine.add_request("b", prompt_of(0), PARAMS, resume=replace(cut(expected, 4), **change))
    assert not engine.has_unfinished()


def test_details_that_a_resumed_request_needs_are_asked_for(engine, expected):
    for params, name in ((replace(PARAMS, top_k=5), "raw_logprobs"), (replace(PARAMS, logprobs=2), "top_logprobs")):
        with pytest.raises(ValueError, match=f"lacks .*{name}"):
            engine.add_request("b", prompt_of(0), params, resume=cut(expected, 4))


# Weights


def update(engine: LLMEngine, setting: Setting, mode: str, **options: Any) -> None:
    engine.update_weights(perturbed(setting, 0.02), engine.policy_version + 1, mode=mode, **options)


def test_an_update_that_waits_finishes_what_has_begun_under_the_old_weights(engine, setting, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 3)
    engine.add_request("later", prompt_of(0), PARAMS)
    update(engine, setting, "wait")
    assert engine.has_unfinished()
    done = drain(engine, ["a", "later"])
    assert bits(done["a"][0]) == bits(expected)
    assert set(done["a"][0].policy_versions) == {0}
    fresh = make_engine(setting)
    update(fresh, setting, "recompute")
    assert bits(done["later"][0]) == bits(run_one(fresh, prompt_of(0), PARAMS))
    assert set(done["later"][0].policy_versions) == {1}


def test_an_update_that_aborts_ends_what_has_begun_and_begins_the_rest_under_the_new_weights(engine, setting, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 3)
    engine.add_request("later", prompt_of(0), PARAMS)
    update(engine, setting, "abort")
    done = drain(engine, ["a", "later"])
    assert done["a"][0].finish_reason == "abort"
    assert 3 <= len(done["a"][0].token_ids) < 16
    assert done["a"][0].token_ids == expected.token_ids[: len(done["a"][0].token_ids)]
    assert set(done["later"][0].policy_versions) == {1}
    assert done["a"][0].is_exact
    assert done["later"][0].is_exact


def test_several_updates_may_meet_one_request(engine, setting):
    engine.add_request("a", prompt_of(0), PARAMS)
    for mode in ("recompute", "recompute", "keep"):
        step_times(engine, 3)
        update(engine, setting, mode)
    [completion] = drain(engine, ["a"])["a"]
    assert completion.policy_versions == sorted(completion.policy_versions)
    assert set(completion.policy_versions) == {0, 1, 2, 3}
    assert not completion.is_exact


def test_a_token_under_way_is_stamped_with_the_weights_that_drew_it(setting):
    engines = [make_engine(setting, async_scheduling=is_async) for is_async in (False, True)]
    for engine in engines:
        engine.add_request("a", prompt_of(0), PARAMS)
        while engine.stats().num_generated_tokens < 4:
            engine.step()
        update(engine, setting, "recompute")
    versions = [drain(engine, ["a"])["a"][0].policy_versions for engine in engines]
    assert versions[0] == [0] * 4 + [1] * 12
    assert versions[1] == [0] * 5 + [1] * 11, "the step under way still belongs to the old weights"


def test_wrong_updates_are_refused_and_the_engine_goes_on(engine, setting, expected):
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 3)
    with pytest.raises(ValueError, match="mode='now' must be 'recompute', 'keep', 'wait' or 'abort'"):
        update(engine, setting, "now")
    with pytest.raises(ValueError, match="policy_version=-1"):
        engine.update_weights(perturbed(setting, 0.02), -1)
    with pytest.raises(ValueError):
        engine.update_weights({"no.such.weight": torch.zeros(3)}, 1)
    engine.pause()
    with pytest.raises(ValueError, match=r"mode='wait' would never end.*resume"):
        update(engine, setting, "wait")
    engine.resume()
    assert bits(drain(engine, ["a"])["a"][0]) == bits(expected)


@pytest.mark.parametrize(("call", "message"), [("update", "another update runs"), ("step", "while its weights change")])
def test_tensors_that_use_the_engine_while_it_takes_them_are_refused(engine, setting, expected, call, message):
    weights = perturbed(setting, 0.02)

    def tensors():
        for name, tensor in weights.items():
            engine.update_weights(weights, 1) if call == "update" else engine.step()
            yield name, tensor

    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 3)
    with pytest.raises(ValueError, match=message):
        engine.update_weights(tensors(), 1)
    assert engine.policy_version == 0
    assert bits(drain(engine, ["a"])["a"][0]) == bits(expected)


# The prefix cache


def test_a_reset_forgets_and_a_forced_one_takes_the_running_along(engine, expected):
    run_one(engine, prompt_of(0), PARAMS)
    assert engine.reset_prefix_cache()
    hits = engine.stats().prefix_cache_hits
    engine.add_request("a", prompt_of(0), PARAMS)
    step_times(engine, 3)
    assert engine.stats().prefix_cache_hits == hits
    assert not engine.reset_prefix_cache()
    assert engine.reset_prefix_cache(preempt_running=True)
    assert bits(drain(engine, ["a"])["a"][0]) == bits(expected)


def test_requests_of_different_salts_share_no_blocks(engine):
    for salt in ("", "a", "b"):
        engine.add_request(f"r{salt}", prompt_of(0), PARAMS, cache_salt=salt)
        assert len(drain(engine, [f"r{salt}"])) == 1
        assert engine.stats().prefix_cache_hits == 0
    engine.add_request("again", prompt_of(0), PARAMS, cache_salt="a")
    drain(engine, ["again"])
    assert engine.stats().prefix_cache_hits == 32


# Failures


@pytest.mark.parametrize("is_async", [False, True])
def test_a_step_that_fails_under_way_loses_nothing(setting, monkeypatch, is_async):
    requests = {f"r{i}": (prompt_of(i), replace(PARAMS, n=2)) for i in range(3)}
    expected = all_bits(run(make_engine(setting), requests))
    engine = make_engine(setting, async_scheduling=is_async)
    for name, request in requests.items():
        engine.add_request(name, *request)
    step_times(engine, 2)
    execute, calls = engine.model_runner.execute, []

    def fail_once(prepared: Any) -> Any:
        calls.append(prepared)
        if len(calls) == 3:
            raise OSError("the device is gone")
        return execute(prepared)

    monkeypatch.setattr(engine.model_runner, "execute", fail_once)
    with pytest.raises(OSError, match="gone"):
        step_times(engine, 10)
    engine.check_integrity()
    assert all_bits(drain(engine, list(requests))) == expected
