"""Advantages: turns the rewards of groups of samples into the advantage of each sample."""

from __future__ import annotations

import torch

from trainers.choices import AdvantageBaseline, AdvantageScale, require_choice


def group_advantages(
    rewards: torch.Tensor,
    *,
    epsilon: float = 1e-4,
    scale: AdvantageScale = "std",
    baseline: AdvantageBaseline = "mean",
) -> torch.Tensor:
    """(R - baseline) / (std + epsilon) within each group.

    rewards: [num_groups, group_size] float; NaN marks a sample without a reward. It counts in no mean and gets
    advantage 0, as does every sample of a group without spread where there is a baseline.
    Returns [num_groups, group_size] float32.

    scale="std" divides by the group's unbiased standard deviation (GRPO, arXiv 2402.03300, section 4.1.2);
    "batch_std" by that of all rewards of the batch (TRL's scale_rewards="batch"; arXiv 2508.08221); "none" does not
    divide (Dr. GRPO, arXiv 2503.20783). baseline="leave_one_out" compares a sample with the mean of its siblings
    (RLOO, arXiv 2402.14740); "none" with nothing (REINFORCE++, arXiv 2501.03262, which whitens over the batch
    instead: see `whiten`). A group of one has baseline 0 and deviation 1, so its advantage is nearly its reward.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards of shape {list(rewards.shape)} must be [num_groups, group_size]")
    require_choice("scale", scale, AdvantageScale)
    require_choice("baseline", baseline, AdvantageBaseline)
    is_valid = ~rewards.isnan()
    values = rewards.double().nan_to_num(nan=0.0)
    advantages = values if rewards.shape[1] == 1 else _baselined(values, is_valid, baseline)
    if scale == "batch_std":
        advantages = advantages / (_deviation(values, is_valid, dim=(0, 1)) + epsilon)
    elif scale == "std":
        std = torch.ones_like(values) if rewards.shape[1] == 1 else _deviation(values, is_valid, dim=1)
        advantages = advantages / (std + epsilon)
    # Rounding leaves a tiny residue around the mean of equal rewards; it is no signal.
    has_signal = is_valid if baseline == "none" else has_spread(rewards)[:, None]
    return torch.where(has_signal, advantages, 0.0).float()


def has_spread(rewards: torch.Tensor) -> torch.Tensor:
    """Which groups hold two different rewards, so that they can teach something.

    rewards: [num_groups, group_size], NaN where a sample has none. Returns [num_groups] bool.
    A group of one always counts: it is compared with 0 rather than with siblings.
    """
    is_valid = ~rewards.isnan()
    if rewards.shape[1] == 1:
        return is_valid[:, 0]
    highest = rewards.masked_fill(~is_valid, -torch.inf).amax(dim=1)
    lowest = rewards.masked_fill(~is_valid, torch.inf).amin(dim=1)
    return highest > lowest


def whiten(
    values: torch.Tensor, loss_mask: torch.Tensor, *, shift_mean: bool = True, epsilon: float = 1e-8
) -> torch.Tensor:
    """(values - mean) / sqrt(variance + epsilon) over the unmasked entries of the whole batch; 0 where masked.

    values, loss_mask: any one shape. The variance is unbiased, as in verl and TRL's PPO; shift_mean=False keeps the
    mean. Give the values of all micro-batches at once: the figures of parts do not add up. Returns float32.
    """
    mask, exact = loss_mask.double(), values.double()
    count = mask.sum().clamp(min=1.0)
    mean = (exact * mask).sum() / count
    variance = ((exact - mean).square() * mask).sum() / (count - 1).clamp(min=1.0)
    whitened = (exact - mean) * (variance + epsilon).rsqrt() + (0.0 if shift_mean else mean)
    return torch.where(mask > 0, whitened, 0.0).float()


def shuffle_rewards(rewards: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Deal the rewards of a batch out again at random: a control in which nothing can be learned.

    rewards: any shape; a permutation of the same values comes back, drawn from `generator`.
    """
    order = torch.randperm(rewards.numel(), generator=generator)
    return rewards.flatten()[order].reshape(rewards.shape)


def _baselined(values: torch.Tensor, is_valid: torch.Tensor, baseline: AdvantageBaseline) -> torch.Tensor:
    if baseline == "none":
        return values
    count = is_valid.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(is_valid, values - mean, 0.0)
    # R - (sum of the others) / (n - 1) = (R - mean) n / (n - 1)
    return centred * (count / (count - 1).clamp(min=1)) if baseline == "leave_one_out" else centred


def _deviation(values: torch.Tensor, is_valid: torch.Tensor, dim: int | tuple[int, ...]) -> torch.Tensor:
    """The unbiased standard deviation of the valid values, 0 where there are fewer than two."""
    count = is_valid.sum(dim=dim, keepdim=True)
    mean = values.sum(dim=dim, keepdim=True) / count.clamp(min=1)
    centred = torch.where(is_valid, values - mean, 0.0)
    return (centred.square().sum(dim=dim, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
