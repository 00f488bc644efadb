"""Advantages: turns the rewards of groups of samples into the advantage of each sample."""

from __future__ import annotations

from typing import Literal

import torch


def group_advantages(
    rewards: torch.Tensor,
    *,
    epsilon: float = 1e-4,
    scale: Literal["std", "none"] = "std",
    baseline: Literal["mean", "leave_one_out"] = "mean",
) -> torch.Tensor:
    """(R - baseline) / (std + epsilon) within each group.

    rewards: [num_groups, group_size] float; NaN marks a sample without a reward. It counts in no mean and gets
    advantage 0, as does every sample of a group without spread.
    Returns [num_groups, group_size] float32.

    scale="std" divides by the unbiased standard deviation (GRPO, arXiv 2402.03300, section 4.1.2); "none" does not
    (Dr. GRPO, arXiv 2503.20783). baseline="leave_one_out" compares a sample with the mean of its siblings
    (RLOO, arXiv 2402.14740). A group of one has baseline 0 and deviation 1, so its advantage is nearly its reward.
    """
    if rewards.ndim != 2:
        raise ValueError(f"rewards of shape {list(rewards.shape)} must be [num_groups, group_size]")
    _require_known("scale", scale, ("std", "none"))
    _require_known("baseline", baseline, ("mean", "leave_one_out"))
    is_valid = ~rewards.isnan()
    values = rewards.double().nan_to_num(nan=0.0)
    if rewards.shape[1] == 1:
        return (values / ((1.0 + epsilon) if scale == "std" else 1.0)).float()
    count = is_valid.sum(dim=1, keepdim=True)
    mean = values.sum(dim=1, keepdim=True) / count.clamp(min=1)
    centred = torch.where(is_valid, values - mean, 0.0)
    advantages = centred * (count / (count - 1).clamp(min=1)) if baseline == "leave_one_out" else centred
    if scale == "std":
        std = (centred.square().sum(dim=1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
        advantages = advantages / (std + epsilon)
    # Rounding leaves a tiny residue around the mean of equal rewards; it is no signal.
    return torch.where(has_spread(rewards)[:, None], advantages, 0.0).float()


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


def shuffle_rewards(rewards: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Deal the rewards of a batch out again at random: a control in which nothing can be learned.

    rewards: any shape; a permutation of the same values comes back, drawn from `generator`.
    """
    order = torch.randperm(rewards.numel(), generator=generator)
    return rewards.flatten()[order].reshape(rewards.shape)


def _require_known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
