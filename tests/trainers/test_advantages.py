from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.advantages import group_advantages, has_spread, shuffle_rewards, whiten

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


def test_the_batchs_deviation_scales_all_groups_alike():
    # means 1 and 4; all rewards: mean 2.5, squared deviations 2.25 + 0.25 + 2.25 + 12.25, variance 17 / 3
    advantages = group_advantages(torch.tensor([[1.0, 1.0], [2.0, 6.0]]), scale="batch_std", epsilon=0.0)
    std = math.sqrt(17 / 3)
    torch.testing.assert_close(advantages, torch.tensor([[0.0, 0.0], [-2.0, 2.0]]) / std)


def test_without_a_baseline_rewards_stay_and_equal_ones_teach_too():
    rewards = torch.tensor([[1.0, 1.0], [NAN, 6.0]])
    assert group_advantages(rewards, scale="none", baseline="none").tolist() == [[1.0, 1.0], [0.0, 6.0]]


def test_a_single_sample_cannot_tell_leave_one_out_from_the_mean():
    rewards = torch.tensor([[2.0], [5.0]])
    for baseline in ("mean", "leave_one_out", "none"):
        assert group_advantages(rewards, scale="none", baseline=baseline).tolist() == [[2.0], [5.0]]


def test_leave_one_out_leaves_unjudged_siblings_out():
    advantages = group_advantages(torch.tensor([[0.0, NAN, 5.0, 1.0]]), scale="none", baseline="leave_one_out")
    assert advantages.tolist() == [[0.0 - 3.0, 0.0, 5.0 - 0.5, 1.0 - 2.5]]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    num_groups=st.integers(1, 5),
    group_size=st.integers(2, 8),
    scale=st.sampled_from(["std", "batch_std", "none"]),
    baseline=st.sampled_from(["mean", "leave_one_out"]),
)
def test_advantages_of_a_group_sum_to_zero_and_shifts_of_its_rewards_change_nothing(
    seed, num_groups, group_size, scale, baseline
):
    rewards = torch.randn(num_groups, group_size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    advantages = group_advantages(rewards, scale=scale, baseline=baseline)
    torch.testing.assert_close(advantages.sum(dim=1), torch.zeros(num_groups), rtol=0.0, atol=1e-5)
    if scale != "batch_std":  # the spread of all rewards counts the shifts, too
        shifted = rewards + torch.arange(num_groups)[:, None]
        again = group_advantages(shifted, scale=scale, baseline=baseline)
        torch.testing.assert_close(again, advantages, rtol=1e-5, atol=1e-6)


def test_whitened_values_have_mean_zero_and_deviation_one():
    values, mask = torch.tensor([1.0, 2.0, 3.0, 50.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    torch.testing.assert_close(whiten(values, mask), torch.tensor([-1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(whiten(values, mask, shift_mean=False), torch.tensor([1.0, 2.0, 3.0, 0.0]))
    assert whiten(values, mask).dtype == torch.float32


def test_whitening_knows_any_layout():
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(5) < torch.tensor([[5], [2], [3]])).float()
    assert torch.equal(whiten(values, mask)[mask > 0], whiten(values[mask > 0], torch.ones(10)))


@pytest.mark.parametrize("value", [0.0, 0.1, -1e10])
def test_equal_values_whiten_to_exactly_zero(value):
    assert torch.equal(whiten(torch.full((7,), value), torch.ones(7)), torch.zeros(7))
    assert torch.equal(whiten(torch.tensor([value]), torch.ones(1)), torch.zeros(1))


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
