from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from engine import SamplingParams
from trainers import ALGORITHMS, GRPOConfig, pack, pack_micro_batches
from trainers.objective import batch_loss, make_targets

CHOICES = {"max_tokens": 8}


@pytest.fixture
def rollouts(make_rollout):
    lengths = [3, 1, 4, 2, 5, 2]
    return [
        make_rollout([1, 2], list(range(10, 10 + length)), group_id=f"g{i // 2}", index=i % 2)
        for i, length in enumerate(lengths)
    ]


ADVANTAGES = [1.0, -1.0, 0.5, -0.5, 2.0, -2.0]


def test_on_policy_targets_are_the_rollouts_own(rollouts):
    batch = pack(rollouts, ADVANTAGES)
    (targets,), metrics = make_targets(GRPOConfig(**CHOICES), [batch])
    assert torch.equal(targets.advantages, batch.advantages)
    assert torch.equal(targets.old_logprobs, batch.rollout_logprobs)
    assert targets.correction is None
    assert metrics == {}


def test_samples_of_a_part_of_the_distribution_are_weighted_by_its_mass(make_rollout):
    fields = {"raw_logprobs": [-1.5, -2.0], "kept_mass": [0.25, 1.0], "sampling_params": SamplingParams(top_p=0.9)}
    rollouts = [make_rollout([1, 2], [10, 11], **fields), make_rollout([1, 2], [12], index=1)]
    batch = pack(rollouts, [1.0, -1.0])
    config = GRPOConfig(**CHOICES, top_p=0.9)
    (targets,), metrics = make_targets(config, [batch])
    assert targets.old_logprobs.tolist() == [-1.5, -2.0, -0.5]
    assert targets.correction.tolist() == [0.25, 1.0, 1.0]
    assert metrics == {"correction/kept_mass_mean": 0.75}
    proximal = batch.rollout_logprobs + torch.tensor([2.0, -2.0, 0.0]).log1p().nan_to_num(-math.log(2))
    (stale,), metrics = make_targets(config, [batch], proximal_logprobs=[proximal])
    assert stale.correction.tolist() == pytest.approx([0.25 * 2.0, 0.5, 1.0])  # a ratio of 3 counts as 2
    assert metrics["correction/weight_mean"] == pytest.approx(2 / 3)
    (plain,), metrics = make_targets(dataclasses.replace(config, correction="none"), [batch])
    assert (plain.correction, metrics) == (None, {})


def test_the_kl_in_the_reward_is_charged_to_a_token_and_those_before_it(rollouts):
    batch = pack(rollouts[:1], [1.0])
    reference = batch.rollout_logprobs - torch.tensor([0.0, 2.0, -1.0])  # k1 is 0, 2, -1
    config = GRPOConfig(**CHOICES, kl_coef=0.5, kl_in="reward", kl_estimator="k1")
    (targets,), metrics = make_targets(config, [batch], reference_logprobs=[reference])
    assert targets.advantages.tolist() == pytest.approx([1.0 - 0.5, 1.0 - 0.5, 1.0 + 0.5])
    assert targets.reference_logprobs is None
    assert metrics["actor/reward_kl_penalty"] == pytest.approx(1 / 3)


def test_a_policy_that_is_its_reference_pays_nothing_to_the_bit(rollouts):
    batch = pack(rollouts, ADVANTAGES)
    config = GRPOConfig(**CHOICES, kl_coef=0.5, kl_in="reward")
    (targets,), _ = make_targets(config, [batch], reference_logprobs=[batch.rollout_logprobs.clone()])
    assert torch.equal(targets.advantages, batch.advantages)


def test_advantages_are_whitened_over_the_tokens_of_all_micro_batches(rollouts):
    config = GRPOConfig(**CHOICES, whiten_advantages=True)
    batches = pack_micro_batches(rollouts, ADVANTAGES, max_tokens=9)
    assert len(batches) > 1
    joined = torch.cat([targets.advantages for targets in make_targets(config, batches)[0]])
    assert joined.mean().item() == pytest.approx(0.0, abs=1e-6)
    assert joined.std().item() == pytest.approx(1.0, rel=1e-6)
    (whole,), _ = make_targets(config, [pack(rollouts, ADVANTAGES)])
    assert torch.equal(joined, whole.advantages)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_micro_batches_add_up_under_every_algorithm(rollouts, name):
    config = GRPOConfig.for_algorithm(name, **CHOICES, entropy_coef=0.01, kl_coef=0.1)
    results = []
    for max_tokens in (9, 1000):
        batches = pack_micro_batches(rollouts, ADVANTAGES, max_tokens)
        references = [batch.rollout_logprobs - 0.1 * batch.target_ids.sin() for batch in batches]
        targets, _ = make_targets(config, batches, reference_logprobs=references)
        total, gradient = 0.0, []
        for batch, target in zip(batches, targets):
            logprobs = (batch.rollout_logprobs + 0.2 * batch.target_ids.cos()).requires_grad_()
            counts = {"num_tokens": sum(b.num_targets for b in batches), "num_samples": len(rollouts)}
            loss = batch_loss(config, logprobs, batch, target, **counts).loss
            loss.backward()
            total += loss.item()
            gradient.append(logprobs.grad)
        results.append((len(batches), total, torch.cat(gradient)))
    assert results[0][0] > results[1][0] == 1
    assert results[0][1] == pytest.approx(results[1][1], rel=1e-5)
    torch.testing.assert_close(results[0][2], results[1][2])


def test_the_proximal_policy_is_the_ratios_denominator_and_corrected_for(rollouts):
    batch = pack(rollouts, ADVANTAGES)
    proximal = batch.rollout_logprobs + math.log(4.0)
    config = GRPOConfig(**CHOICES, correction_high=3.0)
    (targets,), metrics = make_targets(config, [batch], proximal_logprobs=[proximal])
    assert torch.equal(targets.old_logprobs, proximal)
    assert targets.correction.tolist() == [3.0] * batch.num_targets
    assert metrics == {"correction/weight_mean": 3.0, "correction/effective_sample_size": 1.0}
    counts = {"num_tokens": batch.num_targets, "num_samples": len(rollouts)}
    loss = batch_loss(config, proximal, batch, targets, **counts)
    assert loss.loss.item() == pytest.approx(-3.0 * batch.advantages.mean().item())
    assert loss.metrics["actor/pg_clipfrac"] == 0.0
    plain = batch_loss(config, proximal, batch, dataclasses.replace(targets, correction=None), **counts)
    assert plain.loss.item() == pytest.approx(loss.loss.item() / 3)
