"""Weights change under running requests, and every token still has the trainer's bits under its own version."""

from __future__ import annotations

import pytest
import torch
from exactness_checks import (
    NEEDLE,
    Setting,
    bits,
    drain,
    float_bits,
    group_logprobs,
    load_trainer_model,
    make_engine,
    perturbed,
    prompt_of,
    run,
    run_one,
    trainer_logprobs,
)

from engine import Completion, LLMEngine, SamplingParams
from engine.checkpoint import iter_weights
from engine.model import Transformer
from kernels.profiles import PROFILES


@pytest.mark.parametrize("update_steps", [(7, 15), (1, 3)], ids=["after-the-fork", "within-the-prompts"])
def test_an_update_under_running_requests_is_exact_token_by_token(
    setting: Setting, update_steps: tuple[int, int]
) -> None:
    """Each token's log-probability is the trainer's under the version that the engine stamped on it."""
    versions = {
        0: dict(iter_weights(setting.model_dir)), 1: perturbed(setting, 0.01), 2: perturbed(setting, 0.02)
    }  # fmt: skip
    engine = make_engine(setting, max_num_batched_tokens=64, long_prefill_token_threshold=20)
    params = SamplingParams(n=2, max_tokens=24, seed=4, ignore_eos=True)
    prompts = {f"r{i}": prompt_of(i) for i in range(3)}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    done = step_with_updates(engine, {step: versions[i + 1] for i, step in enumerate(update_steps)})
    assert len(done) == 6
    assert all(completion.is_exact for completion in done)
    stamped = check_each_token_under_its_version(load_trainer_model(setting), versions, prompts, done)
    assert stamped == ({0, 1, 2} if update_steps[0] > 3 else {2})


def step_with_updates(engine: LLMEngine, updates: dict[int, dict[str, torch.Tensor]]) -> list[Completion]:
    done: list[Completion] = []
    for step in range(1000):
        if step in updates:
            engine.update_weights(updates[step], engine.policy_version + 1)
        done += engine.step().finished
        if not engine.has_unfinished():
            break
    engine.check_integrity()
    return done


def check_each_token_under_its_version(
    model: Transformer,
    versions: dict[int, dict[str, torch.Tensor]],
    prompts: dict[str, list[int]],
    done: list[Completion],
) -> set[int]:
    """Compares with the trainer's forward at temperature 1; the versions that were stamped on some token."""
    stamped = set()
    for version, weights in versions.items():
        model.load_weights(weights)
        for completion in done:
            expected = trainer_logprobs(model, prompts[completion.request_id], completion, temperature=1.0)
            is_drawn = torch.tensor(completion.policy_versions) == version
            assert float_bits(expected[is_drawn]) == float_bits(torch.tensor(completion.logprobs)[is_drawn])
            stamped.update(completion.policy_versions)
    return stamped


@pytest.mark.parametrize(("is_async", "num_steps"), [(False, 1), (True, 1), (True, 4)])
def test_an_update_meets_preemption_and_a_small_pool(tiny_setting: Setting, is_async: bool, num_steps: int) -> None:
    versions = {0: dict(iter_weights(tiny_setting.model_dir)), 1: perturbed(tiny_setting, 0.01)}
    engine = make_engine(
        tiny_setting, num_blocks=12, max_num_batched_tokens=30, async_scheduling=is_async,
        num_scheduler_steps=num_steps,
    )  # fmt: skip
    params = SamplingParams(n=3, max_tokens=40, seed=4, ignore_eos=True)
    prompts = {f"r{i}": prompt_of(i) for i in range(3)}
    for request_id, prompt in prompts.items():
        engine.add_request(request_id, prompt, params)
    done = step_with_updates(engine, {30: versions[1]})
    assert engine.stats().num_preemptions > 0
    assert check_each_token_under_its_version(load_trainer_model(tiny_setting), versions, prompts, done) == {0, 1}


def test_weights_off_the_trainers_masters_give_the_trainers_own_forward(setting: Setting) -> None:
    """Masters are float32 in each profile; both sides round the same numbers, after every step of an optimiser."""
    engine, model = make_engine(setting), load_trainer_model(setting)
    generator = torch.Generator().manual_seed(7)
    params = SamplingParams(n=4, max_tokens=20, seed=4, ignore_eos=True)
    for version in (1, 2):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(1e-3 * torch.randn(parameter.shape, generator=generator))
        model.repack()
        engine.update_weights(model.named_weights(), version)
        group = run(engine, {"g": (prompt_of(9), params)})["g"]
        for completion, logprobs in zip(group, group_logprobs(model, prompt_of(9), group, 1.0), strict=True):
            assert float_bits(logprobs) == float_bits(completion.logprobs)
    assert (model.lm_head.master != model.lm_head.master.bfloat16().float()).float().mean() > 0.9
    assert model.lm_head.packed.dtype is PROFILES[setting.numerics].weight_dtype


def test_profiles_differ_on_the_same_weights(tiny_setting: Setting) -> None:
    """Else one profile would stand in for another in all these tests."""
    others = [Setting(tiny_setting.model_dir, name) for name in PROFILES if name != tiny_setting.numerics]
    here = run_one(make_engine(tiny_setting), prompt_of(0))
    assert all(bits(run_one(make_engine(other), prompt_of(0))) != bits(here) for other in others)


def test_no_stale_prefix_is_hit_after_an_update(setting: Setting) -> None:
    engine = make_engine(setting)
    run_one(engine, prompt_of(0))
    new = perturbed(setting, 0.02)
    engine.update_weights(new, 1)
    hits = engine.stats().prefix_cache_hits
    updated = run_one(engine, prompt_of(0))
    assert engine.stats().prefix_cache_hits == hits
    fresh = make_engine(setting)
    fresh.update_weights(new, 1)
    assert bits(updated) == bits(run_one(fresh, prompt_of(0)))


def test_the_old_weights_under_an_old_number_find_their_own_blocks_again(tiny_setting: Setting) -> None:
    """Blocks are named by the weights themselves: a trainer that starts over may reuse version numbers."""
    engine = make_engine(tiny_setting)
    first = run_one(engine, prompt_of(0))
    engine.update_weights(perturbed(tiny_setting, 0.02), 1)
    changed = run_one(engine, prompt_of(0))
    engine.update_weights(dict(iter_weights(tiny_setting.model_dir)), 1)
    hits = engine.stats().prefix_cache_hits
    again = run_one(engine, prompt_of(0))
    assert engine.stats().prefix_cache_hits > hits
    assert bits(again) == bits(first) != bits(changed)


def test_keep_goes_on_with_old_blocks_and_says_so(tiny_setting: Setting) -> None:
    engine = make_engine(tiny_setting)
    engine.add_request("kept", prompt_of(0), SamplingParams(max_tokens=16, seed=1, ignore_eos=True))
    for _ in range(6):
        engine.step()
    scheduled = engine.stats().num_scheduled_tokens
    engine.update_weights(perturbed(tiny_setting, 0.01), 1, mode="keep")
    kept = drain(engine, ["kept"])["kept"][0]
    assert engine.stats().num_scheduled_tokens - scheduled == 10  # nothing was computed again
    assert not kept.is_exact
    assert kept.policy_versions == [0] * 6 + [1] * 10
    clean = run_one(engine, prompt_of(0), NEEDLE)
    fresh = make_engine(tiny_setting)
    fresh.update_weights(perturbed(tiny_setting, 0.01), 1)
    assert bits(clean) == bits(run_one(fresh, prompt_of(0), NEEDLE))
