from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.losses import (
    add_losses,
    entropy_loss,
    kl_estimate,
    kl_loss,
    policy_loss,
    policy_ratio,
    token_weights,
    value_loss,
)

LOG2 = math.log(2.0)
AGGREGATIONS = ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
OBJECTIVES = ["clip", "cispo", "reinforce"]
RATIO_LEVELS = ["token", "sequence", "sequence-product"]


def random_batch(lengths: list[int], seed: int) -> dict[str, torch.Tensor]:
    """Packed samples of the given lengths, in float64, with holes in the mask."""
    generator = torch.Generator().manual_seed(seed)
    count = sum(lengths)
    noise = torch.randn(3, count, generator=generator, dtype=torch.float64)
    mask = (torch.rand(count, generator=generator) > 0.2).double()
    mask[0] = 1.0
    sample_index = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.int32)
    old = -2.0 + noise[0]
    return {
        "logprobs": old + 0.3 * noise[1],
        "old_logprobs": old,
        "advantages": noise[2],
        "loss_mask": mask,
        "sample_index": sample_index,
    }


def cut(batch: dict[str, torch.Tensor], is_in: torch.Tensor) -> dict[str, torch.Tensor]:
    return {name: tensor[is_in] for name, tensor in batch.items()}


def loss_of(batch: dict[str, torch.Tensor], aggregation: str, num_tokens: int, num_samples: int, **choices):
    counts = {"num_tokens": num_tokens, "num_samples": num_samples, "max_tokens": 16}
    weights = token_weights(batch["loss_mask"], aggregation, sample_index=batch["sample_index"], **counts)
    return policy_loss(**batch, num_tokens=num_tokens, weights=weights, **choices)


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


@settings(deadline=None, max_examples=60)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    cuts=st.integers(0, 7),
    seed=st.integers(0, 1000),
    aggregation=st.sampled_from(AGGREGATIONS),
    objective=st.sampled_from(OBJECTIVES),
    ratio_level=st.sampled_from(RATIO_LEVELS),
)
def test_micro_batches_add_up_to_the_batch(lengths, cuts, seed, aggregation, objective, ratio_level):
    batch = random_batch(lengths, seed)
    choices = {
        "aggregation": aggregation,
        "num_tokens": int(batch["loss_mask"].sum()),
        "num_samples": len(lengths),
        "objective": objective,
        "ratio_level": ratio_level,
        "dual_clip": 3.0 if objective == "clip" else None,
    }
    whole = loss_of(batch, **choices)
    parts = [
        loss_of(cut(batch, is_in), **choices)
        for is_in in (batch["sample_index"] < cuts, batch["sample_index"] >= cuts)
        if is_in.any()
    ]
    assert sum(part.loss.item() for part in parts) == pytest.approx(whole.loss.item(), rel=1e-9, abs=1e-12)
    for name, value in whole.metrics.items():
        assert sum(part.metrics[name] for part in parts) == pytest.approx(value, rel=1e-9, abs=1e-12)


def test_aggregations_by_hand():
    # samples of 1 and 3 tokens, and a masked one in the second
    mask, samples = torch.tensor([1.0, 1.0, 0.0, 1.0]), torch.tensor([4, 6, 6, 6])

    def weights(aggregation: str) -> list[float]:
        counts = {"num_tokens": 3, "num_samples": 2, "max_tokens": 5}
        return token_weights(mask, aggregation, sample_index=samples, **counts).tolist()

    assert weights("token-mean") == pytest.approx([1 / 3, 1 / 3, 0.0, 1 / 3])
    assert weights("seq-mean-token-sum") == pytest.approx([1 / 2, 1 / 2, 0.0, 1 / 2])
    assert weights("seq-mean-token-mean") == pytest.approx([1 / 2, 1 / 4, 0.0, 1 / 4])
    assert weights("seq-mean-token-sum-norm") == pytest.approx([1 / 10, 1 / 10, 0.0, 1 / 10])


def test_ratio_levels_by_hand():
    old = torch.zeros(3)
    new = torch.tensor([math.log(4.0), 0.0, math.log(3.0)])
    mask, samples = torch.ones(3), torch.tensor([0, 0, 1])
    ratio = {level: policy_ratio(new, old, mask, level, samples).tolist() for level in RATIO_LEVELS}
    assert ratio["token"] == pytest.approx([4.0, 1.0, 3.0])
    assert ratio["sequence"] == pytest.approx([2.0, 2.0, 3.0])
    assert ratio["sequence-product"] == pytest.approx([4.0, 4.0, 3.0])


def test_a_sequences_ratio_does_not_see_masked_tokens():
    new, samples = torch.tensor([LOG2, 50.0]), torch.zeros(2, dtype=torch.int32)
    ratio = policy_ratio(new, torch.zeros(2), torch.tensor([1.0, 0.0]), "sequence", samples)
    assert ratio.tolist() == pytest.approx([2.0, 2.0])


def test_gspos_gradient_is_its_ratio_times_the_samples_mean_gradient():
    # arXiv 2507.18071 eq. 10: s_i A_i / |y_i| on each token, averaged over samples
    new = torch.tensor([-1.0, -1.4, -0.7, -2.0], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([-1.1, -1.2, -0.9, -2.5], dtype=torch.float64)
    samples, advantages = torch.tensor([0, 0, 0, 1]), torch.tensor([2.0, 2.0, 2.0, -1.0], dtype=torch.float64)
    mask = torch.ones(4, dtype=torch.float64)
    weights = token_weights(mask, "seq-mean-token-mean", num_tokens=4, num_samples=2, sample_index=samples)
    choices = {"ratio_level": "sequence", "sample_index": samples, "clip_low": 0.9, "clip_high": 9.0}
    policy_loss(new, old, advantages, mask, num_tokens=4, weights=weights, **choices).loss.backward()
    first, second = math.exp((0.1 - 0.2 + 0.2) / 3), math.exp(0.5)
    assert new.grad.tolist() == pytest.approx([-first * 2 / 3 / 2] * 3 + [second / 2])


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
    ratio_level=st.sampled_from(RATIO_LEVELS),
)
def test_on_policy_ratios_are_exactly_one(lengths, seed, ratio_level):
    batch = {name: t.float() if t.is_floating_point() else t for name, t in random_batch(lengths, seed).items()}
    logprobs, mask = batch["logprobs"], batch["loss_mask"]
    ratio = policy_ratio(logprobs, logprobs.clone(), mask, ratio_level, batch["sample_index"])
    assert torch.equal(ratio, torch.ones_like(logprobs))


@pytest.mark.parametrize(
    ("advantage", "ratio", "expected", "is_bounded"),
    [(-1.0, 5.0, 3.0, True), (-1.0, 2.0, 2.0, False), (1.0, 5.0, -1.2, False)],
)
def test_dual_clip_bounds_the_loss_where_the_advantage_is_negative(advantage, ratio, expected, is_bounded):
    logprobs = torch.tensor([math.log(ratio)], requires_grad=True)
    tensors = logprobs, torch.zeros(1), torch.tensor([advantage]), torch.ones(1)
    output = policy_loss(*tensors, num_tokens=1, dual_clip=3.0)
    assert output.loss.item() == pytest.approx(expected, rel=1e-6)
    assert output.metrics["actor/pg_clipfrac_lower"] == float(is_bounded)
    output.loss.backward()
    assert (logprobs.grad.item() == 0.0) == (is_bounded or advantage > 0)


def test_cispo_bounds_the_weight_and_keeps_the_gradient():
    logprobs = torch.tensor([math.log(9.0), math.log(0.1)], requires_grad=True)
    tensors = logprobs, torch.zeros(2), torch.tensor([1.0, -1.0]), torch.ones(2)
    output = policy_loss(*tensors, num_tokens=2, objective="cispo", clip_low=1.0, clip_high=4.0)
    output.loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-5.0 / 2, 0.1 / 2])
    assert output.metrics["actor/pg_clipfrac"] == 0.5


def test_reinforce_takes_no_ratio():
    logprobs = torch.tensor([-1.0, -2.0], requires_grad=True)
    tensors = logprobs, torch.tensor([-9.0, 3.0]), torch.tensor([1.5, -2.0]), torch.ones(2)
    policy_loss(*tensors, num_tokens=2, objective="reinforce").loss.backward()
    assert logprobs.grad.tolist() == [-0.75, 1.0]


def test_a_correction_weighs_each_tokens_loss():
    tensors = torch.tensor([-1.0, -2.0]), torch.tensor([-1.0, -2.0]), torch.tensor([1.0, 3.0]), torch.ones(2)
    assert policy_loss(*tensors, num_tokens=2, correction=torch.tensor([0.5, 2.0])).loss.item() == -(0.5 + 6.0) / 2
    plain, weighed = policy_loss(*tensors, num_tokens=2), policy_loss(*tensors, num_tokens=2, correction=torch.ones(2))
    assert torch.equal(plain.loss, weighed.loss)


def test_another_denominator_scales_the_loss_alone():
    tensors = torch.tensor([-1.0, -2.0]), torch.tensor([-1.5, -2.0]), torch.tensor([1.0, 3.0]), torch.ones(2)
    token_mean = policy_loss(*tensors, num_tokens=2, clip_high=10.0)
    weights = token_weights(torch.ones(2), "seq-mean-token-sum-norm", num_tokens=2, num_samples=2, max_tokens=4)
    dr_grpo = policy_loss(*tensors, num_tokens=2, weights=weights, clip_high=10.0)
    assert dr_grpo.loss.item() == pytest.approx(token_mean.loss.item() / 4, rel=1e-6)
    assert dr_grpo.metrics["actor/entropy"] == token_mean.metrics["actor/entropy"]


@pytest.mark.parametrize("ratio_level", RATIO_LEVELS)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradients_are_right_in_float64(ratio_level, aggregation, estimator):
    batch = random_batch([3, 1, 5], seed=1)
    logprobs, old = batch.pop("logprobs"), batch["old_logprobs"]
    num_tokens = int(batch["loss_mask"].sum())

    def total_loss(values: torch.Tensor) -> torch.Tensor:
        choices = {"ratio_level": ratio_level, "dual_clip": 1.3}
        pg = loss_of({"logprobs": values, **batch}, aggregation, num_tokens, 3, **choices)
        kl = kl_loss(values, old, batch["loss_mask"], num_tokens=num_tokens, kl_coef=0.1, estimator=estimator)
        return add_losses(pg, kl).loss

    assert torch.autograd.gradcheck(total_loss, (logprobs.requires_grad_(),))


def test_the_entropy_bonus_has_the_gradient_of_the_entropy():
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], dtype=torch.float64, requires_grad=True)
    behaviour = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)  # another policy drew the tokens
    logprobs = logits.log_softmax(dim=0)
    # the expectation over tokens drawn from `behaviour`: each token's term, weighted by its probability
    entropy_loss(logprobs, behaviour.log(), weights=behaviour, entropy_coef=0.7).backward()
    expected = torch.autograd.functional.jacobian(
        lambda z: 0.7 * (z.softmax(0) * z.log_softmax(0)).sum(), logits.detach()
    )
    torch.testing.assert_close(logits.grad, expected)


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 3.0, 5.0], requires_grad=True)
    old, returns = torch.tensor([1.0, 2.0, 5.0]), torch.tensor([2.0, 3.0, 9.0])
    output = value_loss(values, old, returns, torch.tensor([1.0, 1.0, 0.0]), num_tokens=2, clip=0.5)
    # errors 1 and 0; held within 0.5 of the old values: 1 -> 1 and 3 -> 2.5, errors 1 and 0.25
    assert output.loss.item() == pytest.approx(0.5 * (1.0 + 0.25) / 2)
    expected = {"vf_loss": 0.3125, "vf_clipfrac": 0.5, "values_mean": 2.0, "returns_mean": 2.5}
    assert output.metrics == {f"critic/{name}": pytest.approx(value) for name, value in expected.items()}
    output.loss.backward()
    assert values.grad.tolist() == [-0.5, 0.0, 0.0]


def test_value_loss_without_clip_is_half_the_squared_error():
    values, returns = torch.tensor([1.0, 3.0]), torch.tensor([2.0, 7.0])
    output = value_loss(values, torch.zeros(2), returns, torch.ones(2), num_tokens=2, clip=None)
    assert output.loss.item() == 0.5 * (1.0 + 16.0) / 2


def test_value_gradients_are_right_in_float64():
    batch = random_batch([4, 5], seed=2)
    values, old, returns, mask = (batch[n] for n in ("logprobs", "old_logprobs", "advantages", "loss_mask"))
    loss = lambda x: value_loss(x, old, returns, mask, num_tokens=7, clip=0.2).loss
    assert torch.autograd.gradcheck(loss, (values.requires_grad_(),))


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
    zeros, ones = torch.zeros(2), torch.ones(2)
    with pytest.raises(ValueError, match="num_tokens=0"):
        policy_loss(zeros, zeros, zeros, zeros, num_tokens=0)
    with pytest.raises(ValueError, match="'k4'"):
        kl_estimate(zeros, zeros, "k4")
    with pytest.raises(ValueError, match=r"objective='sapo' must be one of 'clip'"):
        policy_loss(zeros, zeros, zeros, ones, num_tokens=2, objective="sapo")
    with pytest.raises(ValueError, match="ratio_level='sequence' needs sample_index"):
        policy_loss(zeros, zeros, zeros, ones, num_tokens=2, ratio_level="sequence")
    with pytest.raises(ValueError, match=r"dual_clip=1.1 must be above 1 \+ clip_high = 1.2"):
        policy_loss(zeros, zeros, zeros, ones, num_tokens=2, dual_clip=1.1)
    with pytest.raises(ValueError, match=r"dual_clip=3.0 belongs to objective='clip'"):
        policy_loss(zeros, zeros, zeros, ones, num_tokens=2, dual_clip=3.0, objective="cispo")
    with pytest.raises(ValueError, match="num_samples=None"):
        token_weights(ones, "seq-mean-token-sum", num_tokens=2)
    with pytest.raises(ValueError, match="max_tokens=None"):
        token_weights(ones, "seq-mean-token-sum-norm", num_tokens=2, num_samples=1)
    with pytest.raises(ValueError, match="aggregation='mean'"):
        token_weights(ones, "mean", num_tokens=2)
    with pytest.raises(ValueError, match="clip=0"):
        value_loss(zeros, zeros, zeros, ones, num_tokens=2, clip=0)
