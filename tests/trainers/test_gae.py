from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.gae import discounted_returns, explained_variance, gae_advantages, packed_gae


def reference_gae(rewards, values, gamma, lam, last_value=0.0):
    """Equation 16 of arXiv 1506.02438 as it stands there: a sum over all later deltas."""
    following = [*values[1:], last_value]
    deltas = [r + gamma * after - v for r, v, after in zip(rewards, values, following)]
    return [sum((gamma * lam) ** k * delta for k, delta in enumerate(deltas[t:])) for t in range(len(rewards))]


def test_gae_by_hand():
    rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
    advantages, returns = gae_advantages(rewards, values, torch.ones(1, 3), gamma=1.0, lam=0.5)
    # deltas 0.1, 0.2, 0.2; A_3 = 0.2, A_2 = 0.2 + 0.5 * 0.2, A_1 = 0.1 + 0.5 * 0.3
    torch.testing.assert_close(advantages, torch.tensor([[0.25, 0.3, 0.2]]))
    torch.testing.assert_close(returns, torch.tensor([[0.75, 0.9, 1.0]]))
    assert advantages.dtype == returns.dtype == torch.float32


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 8), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    gamma=st.sampled_from([1.0, 0.99, 0.5]),
    lam=st.sampled_from([0.0, 0.95, 1.0]),
)
def test_packed_gae_is_the_papers_sum_on_each_sample(lengths, seed, gamma, lam):
    generator = torch.Generator().manual_seed(seed)
    rewards, values = torch.randn(2, sum(lengths), generator=generator)
    last_values = torch.randn(len(lengths), generator=generator)
    samples = torch.tensor([i + 3 for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.int32)
    advantages, returns = packed_gae(rewards, values, samples, gamma=gamma, lam=lam, last_values=last_values)
    expected = []
    for rs, vs, last in zip(rewards.split(lengths), values.split(lengths), last_values):
        expected += reference_gae(rs.double().tolist(), vs.double().tolist(), gamma, lam, last.item())
    torch.testing.assert_close(advantages, torch.tensor(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(returns, advantages + values, rtol=1e-5, atol=1e-5)


def test_masked_tokens_are_stepped_over():
    # an observation of two tokens between two actions, and padding behind
    mask = torch.tensor([[1.0, 0.0, 0.0, 1.0, 0.0]])
    rewards, values = torch.tensor([[0.5, 9.0, 9.0, 1.0, 9.0]]), torch.tensor([[0.2, 7.0, 7.0, 0.4, 7.0]])
    advantages, returns = gae_advantages(rewards, values, mask, gamma=0.9, lam=0.8)
    expected = packed_gae(rewards[mask > 0], values[mask > 0], torch.tensor([0, 0]), gamma=0.9, lam=0.8)
    assert torch.equal(advantages[mask > 0], expected[0])
    assert torch.equal(returns[mask > 0], expected[1])
    assert torch.equal(advantages[mask == 0], torch.zeros(3))
    assert torch.equal(returns[mask == 0], torch.zeros(3))


def test_with_lambda_one_the_return_is_the_discounted_sum_whatever_the_critic_says():
    rewards, samples = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 0, 0, 1])
    returns = packed_gae(rewards, torch.tensor([3.0, -1.0, 0.5, 2.0]), samples, gamma=0.5, lam=1.0)[1]
    assert returns.tolist() == [1.0 + 1.0 + 1.0, 2.0 + 2.0, 4.0, 8.0]
    assert torch.equal(discounted_returns(rewards, samples, gamma=0.5), returns)


def test_a_perfect_critic_leaves_no_advantage():
    rewards, samples = torch.tensor([0.0, 0.0, 3.0]), torch.tensor([0, 0, 0])
    advantages, _ = packed_gae(rewards, torch.full((3,), 3.0), samples)
    assert torch.equal(advantages, torch.zeros(3))


def test_no_gradient_flows_into_the_targets():
    values = torch.ones(2, requires_grad=True)
    advantages, returns = packed_gae(torch.ones(2), values, torch.tensor([0, 0]))
    assert not advantages.requires_grad
    assert not returns.requires_grad


def test_no_tokens_give_no_advantages():
    nothing = torch.zeros(0)
    assert packed_gae(nothing, nothing, torch.zeros(0, dtype=torch.int32))[0].shape == (0,)


def test_explained_variance():
    returns, mask = torch.tensor([1.0, 2.0, 3.0, 99.0]), torch.tensor([1.0, 1.0, 1.0, 0.0])
    assert explained_variance(returns, returns, mask) == 1.0
    assert explained_variance(torch.full((4,), 2.0), returns, mask) == 0.0
    assert math.isnan(explained_variance(returns, torch.ones(4), mask))


@pytest.mark.parametrize(("name", "value"), [("gamma", 1.5), ("lam", -0.1)])
def test_discounts_out_of_range_are_named(name, value):
    zeros = torch.zeros(1, 2)
    with pytest.raises(ValueError, match=f"{name}={value} must be between 0 and 1"):
        gae_advantages(zeros, zeros, zeros, **{name: value})
