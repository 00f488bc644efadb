from __future__ import annotations

import math

import pytest
import torch

from trainers.metrics import PhaseTimer, mismatch_metrics, response_metrics, reward_metrics
from trainers.rewards import Rewards

NAN = math.nan


def test_reward_metrics_by_hand():
    total = torch.tensor([[0.0, 1.0, NAN], [2.0, 2.0, 2.0]])
    metrics = reward_metrics(Rewards(total=total, by_function={"judge": total}, num_failed=1, num_timed_out=2))
    assert metrics["reward/mean"] == pytest.approx(7 / 5)
    assert metrics["reward/std"] == pytest.approx((math.sqrt(0.5) + 0.0) / 2)
    assert metrics["frac_reward_zero_std"] == 0.5
    assert metrics["rewards/judge/mean"] == pytest.approx(7 / 5)
    assert metrics["reward/num_failed"] == 1
    assert metrics["reward/num_timed_out"] == 2
    assert metrics["reward/num_masked"] == 1


def test_means_over_nothing_are_left_out():
    total = torch.full((2, 2), NAN)
    metrics = reward_metrics(Rewards(total=total, by_function={"judge": total}, num_failed=4))
    assert metrics == {
        "frac_reward_zero_std": 1.0,
        "reward/num_failed": 4,
        "reward/num_timed_out": 0,
        "reward/num_masked": 4,
    }


def test_response_metrics_by_hand(make_rollout):
    rollouts = [
        make_rollout([1], [2, 3, 4], finish_reason="length"),
        make_rollout([1], [2], finish_reason="stop"),
        make_rollout([1], [], finish_reason="abort"),
        make_rollout([1], [2, 3, 4, 5], finish_reason="length"),
    ]
    assert response_metrics(rollouts) == {
        "response_length/mean": 2.0,
        "response_length/max": 4,
        "response_length/min": 0,
        "response_length/clip_ratio": 0.5,
        "response/aborted_ratio": 0.25,
    }


def test_equal_logprobs_have_a_mismatch_of_exactly_zero():
    logprobs = torch.tensor([-0.1, -3.7, -20.0])
    assert mismatch_metrics(logprobs, logprobs.clone()) == {
        "mismatch/num_tokens": 3,
        "mismatch/logprob_abs_diff_mean": 0.0,
        "mismatch/logprob_abs_diff_max": 0.0,
        "mismatch/kl": 0.0,
    }


def test_one_unit_in_the_last_place_is_a_mismatch():
    logprobs = torch.tensor([-0.1, -3.7])
    other = logprobs.clone()
    other[1] = torch.nextafter(other[1], torch.tensor(0.0))
    assert mismatch_metrics(logprobs, other)["mismatch/logprob_abs_diff_max"] > 0.0


def test_mismatch_by_hand():
    metrics = mismatch_metrics(torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.5]))
    assert metrics["mismatch/logprob_abs_diff_mean"] == 0.25
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.5
    assert metrics["mismatch/kl"] == pytest.approx((math.exp(0.5) - 0.5 - 1) / 2, rel=1e-6)


def test_nan_is_not_hidden():
    assert math.isnan(mismatch_metrics(torch.tensor([NAN]), torch.tensor([-1.0]))["mismatch/logprob_abs_diff_max"])


def test_without_tokens_nothing_is_claimed():
    assert mismatch_metrics(torch.empty(0), torch.empty(0)) == {"mismatch/num_tokens": 0}


def test_phases_are_announced_and_timed():
    announced = []
    timer = PhaseTimer(announced.append)
    with timer("rollout"):
        pass
    with timer("train"):
        pass
    metrics = timer.metrics()
    assert announced == ["rollout", "train"]
    assert list(metrics) == ["timing_s/rollout", "timing_s/train", "timing_s/step"]
    assert metrics["timing_s/step"] >= metrics["timing_s/rollout"] + metrics["timing_s/train"]
