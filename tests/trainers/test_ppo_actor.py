from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from one_engine import OneEngine

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import PPOConfig
from trainers.ppo_actor import PPOActor

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=3)
CONFIG = PPOConfig(
    num_prompts=3,
    num_epochs=2,
    num_minibatches=3,
    learning_rate=1e-3,
    critic_learning_rate=1e-3,
    warmup_steps=0,
    micro_batch_tokens=64,
    max_tokens=12,
    num_threads=1,
)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture
def engine(model) -> LLMEngine:
    return LLMEngine(EngineConfig(model=model, num_threads=2))


@pytest.fixture
def start(model, engine):
    return lambda **changes: PPOActor(model, "float32", dataclasses.replace(CONFIG, **changes), OneEngine(engine))


@pytest.fixture
def draw(engine, draw_rollouts):
    return lambda: [rollout for group in draw_rollouts(engine, PROMPTS, PARAMS) for rollout in group]


def scores_of(rollouts) -> list[float]:
    return [float(rollout.token_ids[0] % 2) for rollout in rollouts]


def weights_of(actor: PPOActor) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in actor.policy.named_weights()}


def test_the_first_ratio_and_every_mismatch_are_exact_on_every_step(start, draw):
    actor = start()
    for version in range(1, 4):
        rollouts = draw()
        metrics, _ = actor.step(rollouts, scores_of(rollouts))
        assert metrics["policy_version"] == version  # the weights between two updates are nobody's
        assert metrics["actor/first_ratio_abs_diff_max"] == 0.0
        assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
        assert metrics["mismatch/num_tokens"] == sum(len(rollout.token_ids) for rollout in rollouts)
        assert metrics["actor/ppo_kl"] != 0.0  # that of the later updates
        actor.sync()
    assert actor.policy.optimizer.num_updates == actor.critic.optimizer.num_updates == 3 * 6


def test_one_update_has_a_ratio_of_one(start, draw):
    rollouts = draw()
    metrics, _ = start(num_epochs=1, num_minibatches=1).step(rollouts, scores_of(rollouts))
    assert metrics["actor/ppo_kl"] == 0.0
    assert metrics["actor/pg_clipfrac"] == 0.0


def test_a_wrong_logprob_shows_as_mismatch_in_whichever_minibatch_it_is(start, draw):
    rollouts = draw()
    for place in (0, 5, 11):
        logprobs = list(rollouts[place].logprobs)
        logprobs[0] += 2**-10
        wrong = [*rollouts[:place], dataclasses.replace(rollouts[place], logprobs=logprobs), *rollouts[place + 1 :]]
        metrics, _ = start().step(wrong, scores_of(rollouts))
        assert metrics["mismatch/logprob_abs_diff_max"] == pytest.approx(2**-10, rel=1e-3)


def test_without_the_check_the_first_minibatch_alone_is_compared(start, draw):
    rollouts = draw()
    metrics, _ = start(check_all_groups=False).step(rollouts, scores_of(rollouts))
    groups = [sum(len(one.token_ids) for one in rollouts if one.group_id == f"g{p}") for p in range(3)]
    assert metrics["mismatch/num_tokens"] in groups
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0


def test_a_sample_without_a_score_is_compared_but_not_trained_on(start, draw):
    rollouts = draw()
    scores = [math.nan if i in (0, 7) else score for i, score in enumerate(scores_of(rollouts))]
    metrics, advantages = start().step(rollouts, scores)
    num_left_out = len(rollouts[0].token_ids) + len(rollouts[7].token_ids)
    assert metrics["actor/num_tokens"] == metrics["mismatch/num_tokens"] - num_left_out
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert (advantages[0], advantages[7]) == (0.0, 0.0)


def test_without_any_score_policy_and_critic_rest(start, draw):
    actor, rollouts = start(), draw()
    before = weights_of(actor)
    metrics, advantages = actor.step(rollouts, [math.nan] * len(rollouts))
    assert metrics["actor/num_skipped_steps"] == 1
    assert metrics["policy_version"] == 0
    assert metrics["mismatch/num_tokens"] == sum(len(rollout.token_ids) for rollout in rollouts)
    assert advantages == [0.0] * len(rollouts)
    assert all(torch.equal(before[name], tensor) for name, tensor in actor.policy.named_weights())
    assert actor.critic.optimizer.num_updates == 0


def test_the_critic_alone_learns_while_it_warms_up(start, draw):
    actor, rollouts = start(critic_warmup_steps=1), draw()
    before = weights_of(actor)
    metrics, _ = actor.step(rollouts, scores_of(rollouts))
    assert metrics["policy_version"] == 0
    assert metrics["critic/grad_norm"] > 0
    assert "actor/pg_loss" not in metrics
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert all(torch.equal(before[name], tensor) for name, tensor in actor.policy.named_weights())
    metrics, _ = actor.step(rollouts, scores_of(rollouts))
    assert metrics["policy_version"] == 1
    assert metrics["critic/values_mean"] != 0.0


def test_the_critic_explains_a_toy_reward_after_a_few_steps(start, draw):
    """The reward is that of the prompt, which the critic can see and the policy cannot change."""
    actor = start(learning_rate=1e-6, num_epochs=4, num_minibatches=1, value_clip=None)
    explained = []
    for _ in range(8):
        rollouts = draw()
        metrics, _ = actor.step(rollouts, [float(len(rollout.prompt_token_ids) == 4) for rollout in rollouts])
        explained.append(metrics["critic/vf_explained_var"])
        actor.sync()
    assert explained[0] == 0.0  # all values are 0
    assert explained[-1] > 0.8
    assert metrics["critic/vf_loss"] < 0.05


def test_advantages_are_given_back_as_they_were_before_whitening(start, draw):
    rollouts = draw()
    metrics, advantages = start(gamma=1.0, gae_lambda=1.0).step(rollouts, scores_of(rollouts))
    assert metrics["critic/values_mean"] == 0.0
    assert metrics["critic/returns_mean"] == metrics["advantages/mean"]
    assert advantages == scores_of(rollouts)  # values are 0 at first
    of_tokens = [score for one, score in zip(rollouts, advantages, strict=True) for _ in one.token_ids]
    assert metrics["advantages/mean"] == pytest.approx(sum(of_tokens) / len(of_tokens))


def test_micro_batches_do_not_change_the_figures(start, draw):
    rollouts = draw()
    small, _ = start(micro_batch_tokens=16).step(rollouts, scores_of(rollouts))
    large, _ = start(micro_batch_tokens=4096).step(rollouts, scores_of(rollouts))
    for name in ("actor/pg_loss", "actor/entropy", "actor/grad_norm", "critic/vf_loss", "critic/grad_norm"):
        assert small[name] == pytest.approx(large[name], rel=1e-3, abs=1e-5), name


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_the_kl_to_the_first_model_is_zero_at_first_and_not_later(start, draw, kl_in):
    name = {"reward": "actor/reward_kl_penalty", "loss": "actor/kl_loss"}[kl_in]
    actor = start(kl_coef=0.1, kl_in=kl_in, learning_rate=1e-2, num_epochs=1, num_minibatches=1)
    rollouts = draw()
    assert actor.step(rollouts, scores_of(rollouts))[0][name] == 0.0
    actor.sync()
    rollouts = draw()
    assert actor.step(rollouts, scores_of(rollouts))[0][name] != 0.0


def test_stale_rollouts_are_refused(start, draw):
    actor, rollouts = start(), draw()
    actor.step(rollouts, scores_of(rollouts))
    with pytest.raises(ValueError, match=r"versions \[0\], the trainer is at 1 and takes those at most 0 behind it"):
        actor.step(rollouts, scores_of(rollouts))


def test_samples_of_an_older_version_are_weighed_against_the_policy_before_its_first_update(start, draw):
    actor, rollouts = start(mode="lagged", max_staleness=1), draw()
    actor.step(rollouts, scores_of(rollouts))
    metrics, _ = actor.step(rollouts, scores_of(rollouts))
    assert metrics["mismatch/num_stale_tokens"] == metrics["mismatch/num_tokens"] > 0
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert metrics["actor/first_ratio_abs_diff_max"] == 0.0
    assert metrics["correction/weight_mean"] != 1.0
