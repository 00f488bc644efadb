from __future__ import annotations

import math

import pytest
import torch

from trainers.losses import add_losses, kl_estimate, kl_loss, policy_loss, token_weights

LOG2 = math.log(2.0)


def test_on_policy_loss_is_minus_the_mean_advantage():
    logprobs = torch.tensor([-1.0, -2.0, -3.0, -4.0])
    advantages = torch.tensor([1.0, -2.0, 0.5, 4.0])
    output = policy_loss(logprobs, logprobs, advantages, torch.ones(4), num_tokens=4)
    assert output.loss.item() == -3.5 / 4
    assert output.metrics["actor/pg_clipfrac"] == 0.0
    assert output.metrics["actor/ppo_kl"] == 0.0
    assert output.metrics["actor/entropy"] == 2.5


def test_on_policy_gradient_is_reinforce():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    advantages = torch.tensor([1.5, -2.0])
    policy_loss(logprobs, logprobs.detach(), advantages, torch.ones(2), num_tokens=2).loss.backward()
    assert logprobs.grad.tolist() == [-0.75, 1.0]


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "is_clipped"),
    [
        (1.0, 2.0, -1.28, True),  # already likelier than 1 + clip_high: no more to gain
        (1.0, 0.5, -0.5, False),  # unlikelier and good: the whole gradient
        (-1.0, 0.5, 0.8, True),  # already unlikelier than 1 - clip_low
        (-1.0, 2.0, 2.0, False),  # likelier and bad: the whole gradient
        (1.0, 1.25, -1.25, False),  # between the clips, above 1 + clip_low
    ],
)
def test_the_clip_is_asymmetric_and_pessimistic(advantage, ratio, expected, is_clipped):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    output = policy_loss(
        logprobs,
        torch.zeros(1),
        torch.tensor([advantage]),
        torch.ones(1),
        num_tokens=1,
        clip_low=0.2,
        clip_high=0.28,
    )
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["actor/pg_clipfrac"] == float(is_clipped)
    output.loss.backward()
    assert (logprobs.grad.item() == 0.0) == is_clipped


def test_masked_tokens_count_nowhere():
    logprobs = torch.tensor([-1.0, -5.0], requires_grad=True)
    output = policy_loss(
        logprobs, torch.tensor([-1.0, -9.0]), torch.tensor([2.0, 7.0]), torch.tensor([1.0, 0.0]), num_tokens=1
    )
    assert output.loss.item() == -2.0
    assert output.metrics["actor/entropy"] == 1.0
    assert output.metrics["actor/pg_clipfrac"] == 0.0
    output.loss.backward()
    assert logprobs.grad.tolist() == [-2.0, 0.0]


def test_micro_batches_add_up_to_the_batch_when_counts_are_global():
    generator = torch.Generator().manual_seed(0)
    new, old, advantages = torch.randn(3, 64, generator=generator, dtype=torch.float64)
    mask = (torch.rand(64, generator=generator) > 0.3).double()
    num_tokens = int(mask.sum())
    whole = policy_loss(new, old, advantages, mask, num_tokens=num_tokens)
    parts = [
        policy_loss(new[part], old[part], advantages[part], mask[part], num_tokens=num_tokens)
        for part in (slice(0, 5), slice(5, 40), slice(40, 64))
    ]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-12)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, rel=1e-9)


def test_another_denominator_scales_the_loss_alone():
    tensors = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([1.0, 3.0]), torch.ones(2)
    token_mean = policy_loss(*tensors, num_tokens=2, clip_high=10.0)
    weights = token_weights(torch.ones(2), "seq-mean-token-sum-norm", num_tokens=2, num_samples=2, max_tokens=4)
    dr_grpo = policy_loss(*tensors, num_tokens=2, weights=weights, clip_high=10.0)
    assert dr_grpo.loss.item() == pytest.approx(token_mean.loss.item() / 4, rel=1e-6)
    assert dr_grpo.metrics["actor/entropy"] == token_mean.metrics["actor/entropy"]


def test_gradients_are_right_in_float64():
    generator = torch.Generator().manual_seed(1)
    logprobs = (-torch.rand(9, generator=generator, dtype=torch.float64) * 3).requires_grad_()
    old, advantages = torch.randn(2, 9, generator=generator, dtype=torch.float64)
    old = logprobs.detach() + 0.5 * old
    mask = torch.tensor([1.0, 1, 0, 1, 1, 1, 0, 1, 1], dtype=torch.float64)

    def total_loss(values: torch.Tensor) -> torch.Tensor:
        pg = policy_loss(values, old, advantages, mask, num_tokens=7)
        return add_losses(pg, kl_loss(values, old, mask, num_tokens=7, kl_coef=0.1)).loss

    assert torch.autograd.gradcheck(total_loss, (logprobs,))


def test_kl_estimators_by_hand():
    logprobs, reference = torch.tensor([LOG2, 0.0, -LOG2]), torch.zeros(3)
    assert torch.allclose(kl_estimate(logprobs, reference, "k1"), torch.tensor([LOG2, 0.0, -LOG2]))
    assert torch.allclose(kl_estimate(logprobs, reference, "k2"), torch.tensor([LOG2**2 / 2, 0.0, LOG2**2 / 2]))
    assert torch.allclose(kl_estimate(logprobs, reference, "k3"), torch.tensor([0.5 + LOG2 - 1, 0.0, 2 - LOG2 - 1]))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(estimator):
    policy = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64)
    reference = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    exact = (policy * (policy / reference).log()).sum()
    expectation = (policy * kl_estimate(policy.log(), reference.log(), estimator)).sum()
    assert torch.allclose(expectation, exact)


def test_estimates_of_equal_policies_are_exactly_zero():
    logprobs = torch.tensor([-0.1, -7.3, -22.0])
    for estimator in ("k1", "k2", "k3"):
        assert torch.equal(kl_estimate(logprobs, logprobs.clone(), estimator), torch.zeros(3))


def test_kl_loss_reports_the_kl_and_weighs_the_loss():
    output = kl_loss(
        torch.tensor([LOG2, 5.0]),
        torch.zeros(2),
        torch.tensor([1.0, 0.0]),
        num_tokens=1,
        kl_coef=0.5,
        estimator="k1",
    )
    assert output.metrics == {"actor/kl_loss": pytest.approx(LOG2)}
    assert output.loss.item() == pytest.approx(LOG2 / 2)


def test_wrong_arguments_are_named():
    zeros = torch.zeros(2)
    with pytest.raises(ValueError, match="num_tokens=0"):
        policy_loss(zeros, zeros, zeros, zeros, num_tokens=0)
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(zeros, zeros, "k4")
