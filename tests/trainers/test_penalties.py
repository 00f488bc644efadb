from __future__ import annotations

import pytest
import torch

from trainers.penalties import overlong_penalty, token_rewards


def test_long_completions_pay_linearly_within_the_buffer():
    penalties = overlong_penalty([1, 80, 85, 90, 100, 140], max_tokens=100, buffer_tokens=20)
    assert penalties.tolist() == [0.0, 0.0, -0.25, -0.5, -1.0, -1.0]
    assert penalties.dtype == torch.float32


def test_without_a_buffer_only_what_is_too_long_pays():
    assert overlong_penalty([99, 100, 101], max_tokens=100, buffer_tokens=0).tolist() == [0.0, 0.0, -1.0]


def test_the_score_comes_with_the_last_token_and_the_kl_with_each():
    samples = torch.tensor([0, 0, 0, 1])
    scores, kl = torch.tensor([7.0, 7.0, 7.0, -2.0]), torch.tensor([1.0, 2.0, -1.0, 0.0])
    assert token_rewards(scores, kl, samples, kl_coef=0.5).tolist() == [-0.5, -1.0, 7.5, -2.0]


def test_token_rewards_carry_no_gradient():
    kl = torch.ones(2, requires_grad=True)
    assert not token_rewards(torch.ones(2), kl, torch.tensor([0, 0]), kl_coef=0.1).requires_grad


def test_a_buffer_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"buffer_tokens=200 must be between 0 and max_tokens=100"):
        overlong_penalty([1], max_tokens=100, buffer_tokens=200)
