from __future__ import annotations

import pytest
import torch

from trainers import PPOConfig, pack
from trainers.experience import experience_metrics, make_experience


@pytest.fixture
def scored(make_rollout):
    """Two samples of one prompt, of three tokens and of two, with the scores 2 and -1."""
    rollouts = [
        make_rollout([5, 6], [7, 8, 9], index=0, logprobs=[-0.5, -1.0, -0.25]),
        make_rollout([5, 6], [7, 8], index=1, logprobs=[-0.5, -2.0]),
    ]
    return pack(rollouts, [2.0, -1.0])


def test_rewards_advantages_and_returns_worked_by_hand(scored):
    """A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1} with gamma = lambda = 0.5."""
    values = torch.tensor([1.0, 0.0, 4.0, 0.0, 2.0])
    experience = make_experience(PPOConfig(gamma=0.5, gae_lambda=0.5), scored, values)
    # sample 0: A_2 = 2 - 4 = -2; A_1 = 0.5 * 4 - 0 + 0.25 * -2 = 1.5; A_0 = 0 - 1 + 0.25 * 1.5 = -0.625
    # sample 1: A_1 = -1 - 2 = -3; A_0 = 0.5 * 2 - 0 + 0.25 * -3 = 0.25
    assert experience.batch.advantages.tolist() == [-0.625, 1.5, -2.0, 0.25, -3.0]
    assert experience.returns.tolist() == [0.375, 1.5, 2.0, 0.25, -1.0]
    assert experience.kl is None


def test_without_discount_every_token_has_its_samples_score_less_its_value(scored):
    values = torch.tensor([1.0, 0.5, 4.0, 0.0, 2.0])
    experience = make_experience(PPOConfig(), scored, values)
    assert experience.returns.tolist() == [2.0, 2.0, 2.0, -1.0, -1.0]
    assert experience.batch.advantages.tolist() == [1.0, 1.5, -2.0, -1.0, -3.0]


def test_a_kl_in_the_reward_is_paid_on_each_token(scored):
    """k1 = rollout - reference: 0.5, 0, 0.25 and 0, -1, of which each token and those before it pay a half."""
    reference = torch.tensor([-1.0, -1.0, -0.5, -0.5, -1.0])
    config = PPOConfig(kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    experience = make_experience(config, scored, torch.zeros(5), reference)
    assert experience.kl.tolist() == [0.5, 0.0, 0.25, 0.0, -1.0]
    assert experience.returns.tolist() == [1.625, 1.875, 1.875, -0.5, -0.5]
    assert experience_metrics([experience])["actor/reward_kl_penalty"] == pytest.approx(-0.05)
    in_loss = make_experience(PPOConfig(kl_coef=0.5, kl_in="loss"), scored, torch.zeros(5), reference)
    assert in_loss.returns.tolist() == [2.0, 2.0, 2.0, -1.0, -1.0]


def test_figures_are_those_of_all_tokens_before_whitening(scored):
    experience = make_experience(PPOConfig(), scored, torch.tensor([1.0, 1.0, 1.0, 0.0, 0.0]))
    assert experience_metrics([experience]) == {
        "advantages/mean": pytest.approx(0.2),  # 1, 1, 1, -1, -1
        "advantages/std": pytest.approx(0.96**0.5),
        "critic/values_mean": pytest.approx(0.6),
        "critic/returns_mean": pytest.approx(0.8),  # 2, 2, 2, -1, -1
        "critic/vf_explained_var": pytest.approx(1 - 0.96 / 2.16),
    }
