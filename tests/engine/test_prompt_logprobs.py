"""Prompt log-probabilities are the trainer's own bits, whatever happens while the prompt is computed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from exactness_checks import (
    TINY,
    Setting,
    drain,
    float_bits,
    load_trainer_model,
    make_engine,
    packed_logprobs,
    perturbed,
    prompt_of,
    random_mates,
    run,
)

from engine import Completion, LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.model import Transformer
from engine.prompt_logprobs import MAX_ROWS

PROMPT = prompt_of(0, MAX_ROWS + 40)  # its rows are taken in two slices
PARAMS = SamplingParams(max_tokens=4, seed=3, temperature=0.8, ignore_eos=True, prompt_logprobs=0)


def own_bits(completion: Completion, prompt: list[int] = PROMPT) -> list[int]:
    """Bits of the prompt's own tokens, from the second on."""
    entries = completion.prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert len(entries) == len(prompt)
    return float_bits([entry[token_id] for entry, token_id in zip(entries[1:], prompt[1:], strict=True)])


def trainers_bits(model: Transformer, prompt: list[int] = PROMPT) -> list[int]:
    rows = range(len(prompt) - 1)
    segments = [Segment(start_row=0, end_row=len(prompt))]
    return float_bits(packed_logprobs(model, prompt, range(len(prompt)), segments, rows, prompt[1:], 1.0))


def one(engine: LLMEngine, params: SamplingParams = PARAMS, prompt: list[int] = PROMPT) -> Completion:
    return run(engine, {"one": (prompt, params)})["one"][0]


def test_they_are_the_trainers_forward_bit_for_bit(tiny_setting: Setting) -> None:
    expected = trainers_bits(load_trainer_model(tiny_setting))
    assert own_bits(one(make_engine(tiny_setting))) == expected
    assert own_bits(one(make_engine(tiny_setting), replace(PARAMS, prompt_logprobs=3))) == expected


@pytest.fixture
def setting(tiny_model_dir: Callable[..., Path]) -> Setting:
    return Setting(tiny_model_dir("llama", **TINY), "float32")


@pytest.fixture
def expected(setting: Setting) -> list[int]:
    return trainers_bits(load_trainer_model(setting))


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 64, 103])
def test_chunks_do_not_show(setting, expected, chunk, is_async):
    engine = make_engine(setting, max_num_batched_tokens=chunk, async_scheduling=is_async)
    assert own_bits(one(engine)) == expected


def test_company_and_preemption_do_not_show(setting, expected):
    engine = make_engine(setting, num_blocks=14, max_num_batched_tokens=40, async_scheduling=True)
    requests = {**random_mates(4, seed=5), "one": (PROMPT, PARAMS)}
    for name, request in requests.items():
        engine.add_request(name, *request)
    done, num_preempted = [], 0
    while engine.has_unfinished():
        done += engine.step().finished
        running = {request.request_id: request for request in engine.scheduler.running}
        if "one" in running and 0 < running["one"].num_computed_tokens < len(PROMPT) and num_preempted < 2:
            while engine.scheduler._preempt_tail().request_id != "one":
                pass
            num_preempted += 1
    assert num_preempted == 2
    [completion] = [completion for completion in done if completion.request_id == "one"]
    assert own_bits(completion) == expected


def test_such_a_request_reads_nothing_from_the_cache_but_fills_it(setting, expected):
    engine = make_engine(setting)
    plain = replace(PARAMS, prompt_logprobs=None)
    one(engine, plain)
    assert own_bits(one(engine)) == expected
    assert engine.stats().prefix_cache_hits == 0
    engine.reset_prefix_cache()
    one(engine)
    one(engine, plain)
    assert engine.stats().prefix_cache_hits >= len(PROMPT) // 16 * 16


def test_a_request_that_knows_them_already_may_use_the_cache_again(setting, expected):
    engine = make_engine(setting)
    engine.add_request("one", PROMPT, replace(PARAMS, max_tokens=20))
    while not engine.step().new_tokens:
        pass
    engine.scheduler._preempt_tail()
    [completion] = drain(engine, ["one"])["one"]
    assert engine.stats().prefix_cache_hits > 0
    assert own_bits(completion) == expected


def test_the_samples_of_a_group_share_them(setting, expected):
    engine = make_engine(setting)
    group = run(engine, {"g": (PROMPT, replace(PARAMS, n=3))})["g"]
    assert [own_bits(completion) for completion in group] == [expected] * 3
    assert engine.stats().num_scheduled_tokens == len(PROMPT) + 3 * (PARAMS.max_tokens - 1)


def test_an_update_within_the_prompt_leaves_those_of_the_new_weights_alone(setting):
    new, model = perturbed(setting, 0.02), load_trainer_model(setting)
    engine = make_engine(setting, max_num_batched_tokens=20)
    engine.add_request("one", PROMPT, PARAMS)
    engine.step()
    engine.step()
    engine.update_weights(new, 1)
    [completion] = drain(engine, ["one"])["one"]
    model.load_weights(new)
    assert own_bits(completion) == trainers_bits(model)
    assert set(completion.policy_versions) == {1}


def test_an_update_after_the_first_token_leaves_those_of_its_version(setting, expected):
    engine = make_engine(setting)
    engine.add_request("one", PROMPT, replace(PARAMS, max_tokens=9))
    while not engine.step().new_tokens:
        pass
    engine.update_weights(perturbed(setting, 0.02), 1)
    [completion] = drain(engine, ["one"])["one"]
    assert set(completion.policy_versions) == {0, 1}
    assert own_bits(completion) == expected


def test_the_likeliest_come_first_and_the_prompts_own_token_always(setting):
    num_top, model = 4, load_trainer_model(setting)
    completion = one(make_engine(setting), replace(PARAMS, prompt_logprobs=num_top))
    logprobs = all_logprobs(model)
    for entry, row, token_id in zip(completion.prompt_logprobs[1:], logprobs, PROMPT[1:], strict=False):
        values, ids = row.topk(num_top)
        assert list(entry)[:num_top] == ids.tolist()
        assert list(entry)[num_top:] == ([] if token_id in ids else [token_id])
        assert list(entry.values())[:num_top] == pytest.approx(values.tolist(), abs=1e-5)
        assert all(value == struct.unpack("f", struct.pack("f", value))[0] for value in entry.values())


def all_logprobs(model: Transformer) -> torch.Tensor:
    """[T, V] by torch's softmax, of every row of the prompt."""
    attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=len(PROMPT))], model.ops)
    head = model.lm_head
    with torch.no_grad():
        hidden = model(torch.tensor(PROMPT), torch.arange(len(PROMPT)), attention)
        return model.ops.linear(hidden, head.packed, head.num_outputs).log_softmax(-1)


def test_asking_changes_no_token_and_no_logprob(setting):
    plain = one(make_engine(setting), replace(PARAMS, prompt_logprobs=None))
    asked = one(make_engine(setting), replace(PARAMS, prompt_logprobs=5))
    assert (asked.token_ids, asked.logprobs) == (plain.token_ids, plain.logprobs)
    assert plain.prompt_logprobs is None


def test_a_prompt_of_one_token_has_none(setting):
    assert one(make_engine(setting), PARAMS, [5]).prompt_logprobs == [None]


def test_an_aborted_request_hands_back_as_many_as_were_computed_and_a_resumed_one_keeps_its_own(setting, expected):
    engine = make_engine(setting, max_num_batched_tokens=30)
    engine.add_request("one", PROMPT, PARAMS)
    engine.step()
    [partial] = engine.abort(["one"])
    assert len(partial.prompt_logprobs) == 31
    whole = one(make_engine(setting))
    begun = replace(whole, token_ids=whole.token_ids[:2], logprobs=whole.logprobs[:2], policy_versions=[0, 0])
    other = make_engine(setting)
    other.add_request("two", PROMPT, PARAMS, resume=replace(begun, finish_reason="abort"))
    resumed = drain(other, ["two"])["two"][0]
    assert own_bits(resumed) == expected
    assert resumed.token_ids == whole.token_ids
