from __future__ import annotations

import math

import pytest
import torch

from trainers.advantages import group_advantages, has_spread, shuffle_rewards

NAN = math.nan


def test_advantages_are_deviations_over_the_unbiased_std():
    # mean 1, deviations -1, 0, 1; variance 2 / 2 = 1
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 2.0]]), epsilon=0.0)
    assert advantages.tolist() == [[-1.0, 0.0, 1.0]]
    assert advantages.dtype == torch.float32


def test_epsilon_is_added_to_the_std():
    assert group_advantages(torch.tensor([[0.0, 1.0, 2.0]]), epsilon=1.0).tolist() == [[-0.5, 0.0, 0.5]]


def test_one_right_of_eight():
    rewards = torch.zeros(1, 8)
    rewards[0, 3] = 1.0
    # mean 1/8; variance (7/64 + 49/64) / 7 = 1/8
    std = math.sqrt(1 / 8)
    advantages = group_advantages(rewards, epsilon=1e-4)
    assert advantages[0, 3].item() == pytest.approx(0.875 / (std + 1e-4), rel=1e-6)
    assert advantages[0, 0].item() == pytest.approx(-0.125 / (std + 1e-4), rel=1e-6)


def test_groups_are_independent_of_each_other():
    rewards = torch.tensor([[0.0, 1.0, 0.0], [5.0, 5.5, 7.0], [1.0, 1.0, 0.0]])
    together = group_advantages(rewards)
    alone = torch.cat([group_advantages(row[None]) for row in rewards])
    assert torch.equal(together, alone)


@pytest.mark.parametrize("value", [0.0, 1.0, 0.1, -1e30])
@pytest.mark.parametrize("scale", ["std", "none"])
def test_a_group_without_spread_has_advantages_of_exactly_zero(value, scale):
    assert torch.equal(group_advantages(torch.full((1, 7), value), scale=scale), torch.zeros(1, 7))


def test_samples_without_a_reward_count_in_no_mean_and_get_zero():
    advantages = group_advantages(torch.tensor([[0.0, NAN, 1.0, 2.0]]), epsilon=0.0)
    assert advantages.tolist() == [[-1.0, 0.0, 0.0, 1.0]]


def test_a_group_masked_down_to_one_sample_teaches_nothing():
    rewards = torch.tensor([[NAN, 3.0, NAN], [NAN, NAN, NAN]])
    assert torch.equal(group_advantages(rewards), torch.zeros(2, 3))
    assert has_spread(rewards).tolist() == [False, False]


def test_a_group_of_one_is_compared_with_zero():
    assert group_advantages(torch.tensor([[3.0], [NAN]]), epsilon=0.0).tolist() == [[3.0], [0.0]]
    assert has_spread(torch.tensor([[3.0], [NAN]])).tolist() == [True, False]


def test_without_scale_advantages_are_plain_deviations():
    assert group_advantages(torch.tensor([[0.0, 1.0, 5.0]]), scale="none").tolist() == [[-2.0, -1.0, 3.0]]


def test_leave_one_out_compares_with_the_mean_of_the_siblings():
    advantages = group_advantages(torch.tensor([[0.0, 1.0, 5.0]]), scale="none", baseline="leave_one_out")
    assert advantages.tolist() == [[0.0 - 3.0, 1.0 - 2.5, 5.0 - 0.5]]


def test_has_spread_needs_two_different_rewards():
    rewards = torch.tensor([[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, NAN, 1.0], [1.0, NAN, 2.0]])
    assert has_spread(rewards).tolist() == [False, True, False, True]


def test_shuffling_keeps_the_values_and_follows_the_generator():
    rewards = torch.arange(24.0).reshape(3, 8)
    shuffled = shuffle_rewards(rewards, torch.Generator().manual_seed(5))
    assert shuffled.shape == rewards.shape
    assert sorted(shuffled.flatten().tolist()) == rewards.flatten().tolist()
    assert not torch.equal(shuffled, rewards)
    assert torch.equal(shuffled, shuffle_rewards(rewards, torch.Generator().manual_seed(5)))
    assert not torch.equal(shuffled, shuffle_rewards(rewards, torch.Generator().manual_seed(6)))


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match=r"\[4\].*num_groups, group_size"):
        group_advantages(torch.zeros(4))
    with pytest.raises(ValueError, match="scale='max'"):
        group_advantages(torch.zeros(1, 4), scale="max")
    with pytest.raises(ValueError, match="baseline='median'"):
        group_advantages(torch.zeros(1, 4), baseline="median")
