"""Prompt log-probabilities are the trainer's own bits, whatever happens while the prompt is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
from engine.prompt_logprobs import MAX_LOGITS_ROWS, MAX_ROWS

PROMPT = prompt_of(0, MAX_LOGITS_ROWS + 40)  # its logits are written out in two slices
PARAMS = SamplingParams(max_tokens=4, seed=3, temperature=0.8, ignore_eos=True, prompt_logprobs=0)


def own_bits(completion: Completion, prompt: list[int] = PROMPT) -> list[int]:
    """Bits of the prompt's own tokens, from the second on."""
    entries = completion.prompt_logprobs
    assert entries is not None
    assert entries[0] is None
    assert len(entries) == len(prompt)
    return float_bits([entry[token_id] for entry, token_id in zip(entries[1:], prompt[1:], strict=True)])


def trainers_bits(model: Transformer, prompt: list[int] = PROMPT) -> list[int]:
    return trainers_bits_of(model, prompt, range(len(prompt) - 1), prompt[1:])


def trainers_bits_of(model: Transformer, prompt: list[int], rows: Sequence[int], targets: list[int]) -> list[int]:
    """Of any tokens after rows of the prompt."""
    segments = [Segment(start_row=0, end_row=len(prompt))]
    return float_bits(packed_logprobs(model, prompt, range(len(prompt)), segments, rows, targets, 1.0))


def one(engine: LLMEngine, params: SamplingParams = PARAMS, prompt: list[int] = PROMPT) -> Completion:
    return run(engine, {"one": (prompt, params)})["one"][0]


def test_they_are_the_trainers_forward_bit_for_bit(tiny_setting: Setting) -> None:
    expected = trainers_bits(load_trainer_model(tiny_setting))
    assert own_bits(one(make_engine(tiny_setting))) == expected
    assert own_bits(one(make_engine(tiny_setting), replace(PARAMS, prompt_logprobs=3))) == expected


def test_a_long_prompt_is_taken_in_slices(setting):
    prompt, model = prompt_of(1, MAX_ROWS + 40), load_trainer_model(setting)
    assert own_bits(one(make_engine(setting), prompt=prompt), prompt) == trainers_bits(model, prompt)


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


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_a_prompt_that_is_known_up_to_its_last_row_is_reported_again_under_new_weights(setting, mode):
    """With `keep`, a request that has lost its blocks computes them under the new weights too, and is exact."""
    new, model = perturbed(setting, 0.02), load_trainer_model(setting)
    engine = make_engine(setting, max_num_batched_tokens=len(PROMPT) - 1, async_scheduling=False)
    engine.add_request("one", PROMPT, PARAMS)
    engine.step()
    engine.scheduler._preempt_tail()
    engine.update_weights(new, 1, mode=mode)
    [completion] = drain(engine, ["one"])["one"]
    model.load_weights(new)
    assert completion.is_exact
    assert set(completion.policy_versions) == {1}
    assert own_bits(completion) == trainers_bits(model)


def test_samples_whose_first_tokens_are_of_different_weights_have_their_own(setting, expected):
    """One sample goes on from a token of the old weights, the others begin under the new ones."""
    new, model = perturbed(setting, 0.02), load_trainer_model(setting)
    params = replace(PARAMS, n=3, max_tokens=9)
    group = run(make_engine(setting), {"g": (PROMPT, params)})["g"]
    engine = make_engine(setting, max_num_batched_tokens=40)
    engine.update_weights(new, 1)
    engine.add_request("g", PROMPT, params, resume=cut(group[1], 2))
    done = drain(engine, ["g"])["g"]
    model.load_weights(new)
    assert [own_bits(completion) for completion in done] == [trainers_bits(model), expected, trainers_bits(model)]


def test_samples_that_a_failed_step_parts_have_those_of_their_own_first_token(setting, expected, monkeypatch):
    new, model = perturbed(setting, 0.02), load_trainer_model(setting)
    engine = make_engine(setting, max_num_batched_tokens=len(PROMPT), async_scheduling=False)
    engine.add_request("g", PROMPT, replace(PARAMS, n=2, max_tokens=9))
    with monkeypatch.context() as patch:
        patch.setattr(engine.model_runner, "execute", fail)
        with pytest.raises(OSError, match="gone"):
            engine.step()
    assert [token.index for token in engine.step().new_tokens] == [0]
    engine.update_weights(new, 1)
    done = drain(engine, ["g"])["g"]
    model.load_weights(new)
    assert [completion.policy_versions[0] for completion in done] == [0, 1]
    assert [own_bits(completion) for completion in done] == [expected, trainers_bits(model)]


def fail(prepared: object) -> None:
    raise OSError("the device is gone")


def test_the_likeliest_come_first_and_the_prompts_own_token_always(setting):
    num_top, model = 4, load_trainer_model(setting)
    completion = one(make_engine(setting), replace(PARAMS, prompt_logprobs=num_top))
    logprobs = all_logprobs(model)
    for entry, row, token_id in zip(completion.prompt_logprobs[1:], logprobs, PROMPT[1:], strict=False):
        values, ids = row.topk(num_top)
        assert list(entry)[:num_top] == ids.tolist()
        assert list(entry)[num_top:] == ([] if token_id in ids else [token_id])
        assert list(entry.values())[:num_top] == pytest.approx(values.tolist(), abs=1e-5)


def test_what_is_listed_is_the_trainers_forward_bit_for_bit_too(tiny_setting: Setting) -> None:
    completion = one(make_engine(tiny_setting), replace(PARAMS, prompt_logprobs=20))
    listed = [(row, *pair) for row, entry in enumerate(completion.prompt_logprobs[1:]) for pair in entry.items()]
    rows, ids, values = zip(*listed, strict=True)
    assert len(ids) > 20 * len(PROMPT) - 20
    assert float_bits(values) == trainers_bits_of(load_trainer_model(tiny_setting), PROMPT, rows, list(ids))


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


def test_an_aborted_request_hands_back_as_many_as_were_computed(setting, expected):
    engine = make_engine(setting, max_num_batched_tokens=30, async_scheduling=False)
    engine.add_request("g", PROMPT, replace(PARAMS, n=2))
    engine.step()
    partial = engine.abort(["g"])
    for completion in partial:
        assert own_bits(completion, PROMPT[:31]) == expected[:30]


def test_a_resumed_request_keeps_those_it_had(setting, expected):
    whole = one(make_engine(setting))
    other = make_engine(setting)
    other.update_weights(perturbed(setting, 0.02), 1)
    other.add_request("two", PROMPT, PARAMS, resume=cut(whole, 2))
    resumed = drain(other, ["two"])["two"][0]
    assert resumed.policy_versions == [0, 0, 1, 1]
    assert own_bits(resumed) == expected


@pytest.mark.parametrize("known", [None, [None, {7: -1.0}]])
def test_a_request_cannot_be_resumed_without_those_it_had(setting, known):
    partial = replace(cut(one(make_engine(setting)), 2), prompt_logprobs=known)
    with pytest.raises(ValueError, match=f"'two' to resume lacks prompt_logprobs of its {len(PROMPT)} prompt tokens"):
        make_engine(setting).add_request("two", PROMPT, PARAMS, resume=partial)


def cut(completion: Completion, keep: int) -> Completion:
    """The first tokens of a completion, as an abort would have left it."""
    columns = {name: getattr(completion, name)[:keep] for name in ("token_ids", "logprobs", "policy_versions")}
    return replace(completion, finish_reason="abort", **columns)
