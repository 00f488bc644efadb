from __future__ import annotations

import dataclasses
import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainers.choices import Correction
from trainers.corrections import (
    correction_weights,
    effective_sample_size,
    staleness_metrics,
    token_staleness,
    truncation_weights,
    untruncated_logprobs,
)
from trainers.losses import policy_loss

SAMPLES = torch.tensor([0, 0, 1])
BEHAVIOUR = torch.zeros(3)
PROXIMAL = torch.tensor([math.log(4.0), math.log(0.25), math.log(0.5)])  # ratios 4, 1/4 and 1/2; products 1 and 1/2


@pytest.mark.parametrize(
    ("correction", "expected"),
    [
        ("none", [1.0, 1.0, 1.0]),
        ("token-truncate", [2.0, 0.4, 0.5]),
        ("token-mask", [0.0, 0.0, 0.5]),
        ("sequence-truncate", [1.0, 1.0, 0.5]),
        ("sequence-mask", [1.0, 1.0, 0.5]),
        ("token-truncate-sequence-mask", [2.0, 0.25, 0.5]),
    ],
)
def test_corrections_by_hand(correction, expected):
    weights = correction_weights(PROXIMAL, BEHAVIOUR, torch.ones(3), SAMPLES, correction=correction, low=0.4, high=2.0)
    assert weights.tolist() == pytest.approx(expected)


def test_a_masked_sequence_loses_all_its_tokens():
    bounds = {"low": 0.6, "high": 2.0}
    for correction in ("sequence-mask", "token-truncate-sequence-mask"):
        weights = correction_weights(PROXIMAL, BEHAVIOUR, torch.ones(3), SAMPLES, correction=correction, **bounds)
        assert (weights > 0).tolist() == [True, True, False]


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 1000),
    correction=st.sampled_from(get_args(Correction)),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_on_policy_every_weight_is_exactly_one(seed, correction, lengths):
    logprobs = -10 * torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    samples = torch.tensor([i for i, length in enumerate(lengths) for _ in range(length)], dtype=torch.int32)
    mask = torch.ones_like(logprobs)
    weights = correction_weights(logprobs, logprobs.clone(), mask, samples, correction=correction)
    assert torch.equal(weights, mask)
    assert effective_sample_size(weights, mask) == 1.0


def test_the_decoupled_objective_is_unbiased_off_policy():
    # from behaviour to proximal by the weight, on to current by the ratio
    behaviour = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    proximal = torch.tensor([0.4, 0.4, 0.2], dtype=torch.float64)
    advantages = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    logits = torch.tensor([0.1, -0.2, 0.3], dtype=torch.float64, requires_grad=True)
    ones, samples = torch.ones(3, dtype=torch.float64), torch.arange(3)
    correction = correction_weights(proximal.log(), behaviour.log(), ones, samples, high=10.0)
    choices = {"clip_low": 1.0, "clip_high": 9.0}
    loss = policy_loss(
        logits.log_softmax(0), proximal.log(), advantages, ones, num_tokens=3, weights=behaviour,
        correction=correction, **choices,
    ).loss  # fmt: skip
    expected = -(logits.softmax(0) * advantages).sum()
    torch.testing.assert_close(loss, expected)
    ours, theirs = torch.autograd.grad(loss, logits, retain_graph=True), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(ours, theirs)


def test_bounds_that_leave_out_one_are_refused():
    for low, high in ((1.5, 2.0), (0.0, 0.9), (-0.1, 2.0)):
        with pytest.raises(ValueError, match=f"low={low} and high={high}"):
            correction_weights(PROXIMAL, BEHAVIOUR, torch.ones(3), SAMPLES, low=low, high=high)
    with pytest.raises(ValueError, match="correction='tis' must be one of 'none'"):
        correction_weights(PROXIMAL, BEHAVIOUR, torch.ones(3), SAMPLES, correction="tis")


def test_effective_sample_size_is_the_share_that_still_counts():
    ones = torch.ones(4)
    assert effective_sample_size(torch.tensor([0.0, 0.0, 7.0, 0.0]), ones) == 0.25
    assert effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]), ones) == 0.5
    assert effective_sample_size(torch.tensor([3.0, 3.0, 9.0, 9.0]), torch.tensor([1.0, 1.0, 0.0, 0.0])) == 1.0
    assert effective_sample_size(torch.zeros(4), ones) == 0.0


def test_truncated_sampling_is_weighed_by_the_kept_mass():
    full = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
    kept = torch.tensor([True, True, False, False])
    mass = full[kept].sum()
    truncated = torch.where(kept, full / mass, 0.0)
    weights = truncation_weights(torch.full((4,), mass.item())).double()
    torch.testing.assert_close((truncated * weights)[kept], full[kept], rtol=1e-6, atol=0.0)
    back = untruncated_logprobs(truncated[kept].log(), torch.full((2,), mass.item()))
    torch.testing.assert_close(back.double(), full[kept].log(), rtol=1e-6, atol=1e-6)


def test_where_nothing_was_cut_log_probabilities_keep_their_bits():
    logprobs = torch.tensor([-0.1, -7.3, -22.0])
    assert torch.equal(untruncated_logprobs(logprobs, torch.ones(3)), logprobs)
    assert torch.equal(truncation_weights(torch.ones(3)), torch.ones(3))
    with pytest.raises(ValueError, match="kept_mass"):
        truncation_weights(torch.tensor([0.5, 0.0]))


def test_staleness_is_counted_token_by_token(make_rollout):
    first = make_rollout([1], [2, 3, 4], policy_versions=[3, 3, 5])
    second = dataclasses.replace(make_rollout([1], [2, 3], policy_versions=[1, 4]), loss_mask=[0, 1])
    assert token_staleness([first, second], policy_version=5).tolist() == [2, 2, 0, 1]
    assert staleness_metrics([first, second], policy_version=5) == {"staleness/mean": 1.25, "staleness/max": 2}
    assert staleness_metrics([], policy_version=5) == {}
