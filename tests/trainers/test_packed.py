from __future__ import annotations

import torch

from trainers.packed import is_last_token, sample_means, sample_sums, to_padded

SAMPLES = torch.tensor([2, 2, 5, 6, 6, 6], dtype=torch.int32)  # as a micro-batch has them: from the middle of a list
VALUES = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0, 32.0])


def test_sums_and_means_stand_on_every_token_of_their_sample():
    assert sample_sums(VALUES, SAMPLES).tolist() == [3.0, 3.0, 4.0, 56.0, 56.0, 56.0]
    mask = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    assert sample_means(VALUES, mask, SAMPLES).tolist() == [1.0, 1.0, 0.0, 12.0, 12.0, 12.0]


def test_last_tokens_are_those_before_another_sample():
    assert is_last_token(SAMPLES).tolist() == [False, True, True, False, False, True]


def test_padded_and_back_are_the_same_values():
    padded, is_token = to_padded(VALUES, SAMPLES)
    assert padded.tolist() == [[1.0, 2.0, 0.0], [4.0, 0.0, 0.0], [8.0, 16.0, 32.0]]
    assert torch.equal(padded[is_token], VALUES)


def test_no_tokens_are_no_samples():
    nothing, samples = torch.zeros(0), torch.zeros(0, dtype=torch.int32)
    assert sample_sums(nothing, samples).shape == (0,)
    assert to_padded(nothing, samples)[0].numel() == 0


def test_a_samples_sum_has_the_same_bits_in_any_company():
    generator = torch.Generator().manual_seed(0)
    values, samples = torch.randn(40, generator=generator), torch.arange(40, dtype=torch.int32) // 10
    together = sample_sums(values, samples)
    for i in range(4):
        alone = sample_sums(values[samples == i], samples[samples == i])
        assert torch.equal(alone, together[samples == i])
