from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
from reward_functions import has_letter_e

from rollout import EngineConfig
from trainers import PPOConfig, PPOTrainer

ROWS = [{"prompt": f"what is {a} + {b}? ", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 4)]
EVAL_ROWS = [{"prompt": "what is 7 + 8? ", "answer": "15"}]
CONFIG = PPOConfig(
    num_steps=4,
    num_prompts=4,
    group_size=2,
    max_tokens=8,
    num_epochs=2,
    num_minibatches=2,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    micro_batch_tokens=128,
    num_threads=1,
    reward_processes=0,
    seed=1,
)


@pytest.fixture(scope="module")
def engine_config(tiny_model_dir) -> EngineConfig:
    return EngineConfig(model=str(tiny_model_dir("llama")), num_threads=1)


def run(engine_config: EngineConfig, reward=has_letter_e, **changes) -> SimpleNamespace:
    """A run with the samples' advantages of every step."""
    advantages = []

    def look(metrics: dict[str, float]) -> None:
        if trainer.batch is not None:
            advantages.append(trainer.batch.advantages)

    config = dataclasses.replace(CONFIG, **changes)
    trainer = PPOTrainer(config, engine_config, ROWS, reward, EVAL_ROWS, callbacks=[look])
    return SimpleNamespace(history=trainer.train(), advantages=advantages, trainer=trainer)


@pytest.fixture(scope="module")
def synchronous(local_ray, engine_config) -> SimpleNamespace:
    return run(engine_config)


@pytest.fixture(scope="module")
def lagged(local_ray, engine_config) -> SimpleNamespace:
    return run(engine_config, mode="lagged")


@pytest.fixture(scope="module")
def two_ranks(local_ray, engine_config) -> SimpleNamespace:
    return run(engine_config, num_trainer_ranks=2, trainer_parallelism="fsdp")


def settled(history: list[dict[str, float]]) -> list[dict[str, str]]:
    """Without what depends on the clock; as text, since NaN equals nothing."""
    return [
        {name: repr(value) for name, value in step.items() if not name.startswith(("timing_s/", "perf/", "weight_s"))}
        for step in history
    ]


@pytest.mark.parametrize(
    "mode", ["synchronous", *(pytest.param(n, marks=pytest.mark.slow) for n in ("lagged", "two_ranks"))]
)
def test_mismatch_and_the_first_ratios_difference_from_one_are_exactly_zero(mode, request):
    steps = request.getfixturevalue(mode).history[1:]
    assert [metrics["policy_version"] for metrics in steps] == [1, 2, 3, 4]
    assert all(metrics["mismatch/num_tokens"] > 0 for metrics in steps)
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in steps] == [0.0] * 4
    assert [metrics["mismatch/kl"] for metrics in steps] == [0.0] * 4
    assert [metrics["actor/first_ratio_abs_diff_max"] for metrics in steps] == [0.0] * 4


@pytest.mark.slow
def test_a_lagged_run_learns_from_older_tokens_under_weights(lagged):
    assert [metrics["staleness/max"] for metrics in lagged.history[1:]] == [0, 1, 1, 1]
    assert ["correction/weight_mean" in metrics for metrics in lagged.history[1:]] == [False, True, True, True]


@pytest.mark.slow
def test_an_asynchronous_run_is_exact_and_goes_on_while_the_critic_warms_up(local_ray, engine_config):
    steps = run(engine_config, mode="async", max_staleness=2, critic_warmup_steps=2, max_tokens=30).history[1:]
    assert [metrics["policy_version"] for metrics in steps] == [0, 0, 1, 2]
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in steps] == [0.0] * 4
    assert [metrics.get("actor/first_ratio_abs_diff_max") for metrics in steps] == [None, None, 0.0, 0.0]


@pytest.mark.slow
def test_the_same_seed_gives_the_same_run_whatever_the_engines(synchronous, engine_config):
    again = run(dataclasses.replace(engine_config, num_threads=2), num_engines=2)
    assert settled(again.history) == settled(synchronous.history)
    assert [one.tolist() for one in again.advantages] == [one.tolist() for one in synchronous.advantages]


def test_dashboard_names_are_those_that_people_know(synchronous):
    names = {
        "reward/mean", "mismatch/kl", "response_length/mean", "timing_s/train", "perf/train_tokens_per_second",
        "actor/pg_loss", "actor/pg_clipfrac", "actor/ppo_kl", "actor/entropy", "actor/grad_norm", "actor/lr",
        "critic/vf_loss", "critic/vf_clipfrac", "critic/vf_explained_var", "critic/values_mean",
        "critic/returns_mean", "critic/grad_norm", "critic/lr", "advantages/mean", "advantages/std",
    }  # fmt: skip
    for metrics in synchronous.history[1:]:
        assert names <= set(metrics)
        assert all(isinstance(value, int | float) for value in metrics.values())


def test_advantages_of_the_first_batch_are_its_rewards(synchronous):
    """Values begin at zero, and nothing is discounted."""
    assert synchronous.history[1]["critic/values_mean"] == 0.0
    assert synchronous.history[2]["critic/values_mean"] != 0.0
    assert set(synchronous.advantages[0].flatten().tolist()) <= {0.0, 1.0}
    assert not set(synchronous.advantages[1].flatten().tolist()) <= {0.0, 1.0}


def test_a_batch_without_rewards_is_only_compared_and_samples_that_were_cut_off_pay_for_it(local_ray, engine_config):
    seen = set()

    def no_judge_for_the_first_batch(prompts, completions):
        seen.update(prompts)  # each batch has four new ones
        return [None if len(seen) <= 4 else 1.0] * len(completions)

    result = run(engine_config, no_judge_for_the_first_batch, num_steps=2, missing_eos_penalty=0.5)
    first, second = result.history[1:]
    assert (first["policy_version"], first["actor/num_skipped_steps"]) == (0, 1)
    assert first["mismatch/num_tokens"] > 0
    assert (second["policy_version"], second["mismatch/logprob_abs_diff_max"]) == (1, 0.0)
    assert second["reward/mean"] == 1.0  # reported as it was given
    groups = result.trainer.batch.groups
    assert "length" in {one.finish_reason for group in groups for one in group}
    for group, of_group in zip(groups, result.advantages[1].tolist(), strict=True):  # the critic still says 0
        assert of_group == [0.5 if one.finish_reason == "length" else 1.0 for one in group]


@pytest.mark.parametrize(
    "field",
    [
        {"num_epochs": 0}, {"num_minibatches": 0}, {"gamma": 1.5}, {"gae_lambda": -0.5}, {"value_clip": 0.0},
        {"critic_learning_rate": 0.0}, {"critic_head_learning_rate": -1.0}, {"critic_warmup_steps": -1},
        {"missing_eos_penalty": -1.0}, {"num_minibatches": 17}, {"num_prompts": 0}, {"clip_low": 0.0},
        {"kl_coef": -0.1}, {"dual_clip": 1.0}, {"kl_in": "nowhere"}, {"kl_estimator": "k4"},
    ],
)  # fmt: skip
def test_wrong_settings_are_named(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        PPOConfig(**field)
