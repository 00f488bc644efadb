"""Packed values: sums over each sample's tokens, and the way from packed to padded and back.

C counts packed tokens, whose samples stand one after the other; B samples, T the tokens of the longest.
"""

from __future__ import annotations

import torch


def sample_sums(values: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
    """On each token the sum over its sample, in the order of the tokens; [C], differentiable.

    values: [C]. sample_index: [C] int, as PackedBatch has it. Tokens that are to be left out hold 0.
    """
    num_samples = int(sample_index.max()) + 1 if sample_index.numel() else 0
    sums = values.new_zeros(num_samples).index_add(0, sample_index, values)
    return sums.index_select(0, sample_index)


def sample_means(values: torch.Tensor, loss_mask: torch.Tensor, sample_index: torch.Tensor) -> torch.Tensor:
    """On each token the mean over the unmasked tokens of its sample, 0 where there are none; [C], differentiable."""
    counts = sample_sums(loss_mask, sample_index)
    return sample_sums(values * loss_mask, sample_index) / counts.clamp(min=1.0)


def is_last_token(sample_index: torch.Tensor) -> torch.Tensor:
    """Which tokens are the last of their sample; [C] bool."""
    is_last = torch.ones_like(sample_index, dtype=torch.bool)
    is_last[:-1] = sample_index[1:] != sample_index[:-1]
    return is_last


def to_padded(values: torch.Tensor, sample_index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Packed values [C] as rows of samples [B, T], zeros behind the shorter, and where they stand [B, T] bool.

    `padded[is_token]` is the packed form again.
    """
    _, lengths = torch.unique_consecutive(sample_index, return_counts=True)
    num_columns = int(lengths.max()) if lengths.numel() else 0
    is_token = torch.arange(num_columns, device=values.device)[None, :] < lengths[:, None]
    padded = values.new_zeros(is_token.shape)
    padded[is_token] = values
    return padded, is_token
