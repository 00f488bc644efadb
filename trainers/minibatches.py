"""Minibatches: parts of a batch that are learned from one after the other, in several passes."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby, pairwise

import torch

from rollout import Rollout


def split_groups(rollouts: Sequence[Rollout], samples: Sequence[int], num_parts: int) -> list[list[int]]:
    """The samples (places in rollouts) of each part, in order; groups stay whole, and parts hold about as many.

    Where there are fewer groups than parts, there are fewer parts.
    """
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: rollouts[sample].group_id)]
    bounds = [part * len(groups) // num_parts for part in range(num_parts + 1)]
    parts = [groups[start:end] for start, end in pairwise(bounds)]
    return [[sample for group in part for sample in group] for part in parts if part]


def visiting_order(num_parts: int, num_epochs: int, seed: int) -> list[int]:
    """Which part each update learns from: every part once an epoch, each epoch in an order of its own."""
    generator = torch.Generator().manual_seed(seed)
    return [part for _ in range(num_epochs) for part in torch.randperm(num_parts, generator=generator).tolist()]
