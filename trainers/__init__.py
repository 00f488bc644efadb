"""Trainers: turns rollouts into better weights - packing, advantages, losses, the Policy and the GRPO loop."""

from __future__ import annotations

import importlib

_HOMES = {
    "GRPOConfig": "trainers.grpo_config",
    "GRPOTrainer": "trainers.grpo",
    "LossOutput": "trainers.losses",
    "PackedBatch": "trainers.batch",
    "Policy": "trainers.policy",
    "RewardScorer": "trainers.rewards",
    "Rewards": "trainers.rewards",
    "TrainerRankError": "trainers.trainer_group",
    "episode_metrics": "trainers.episodes",
    "episode_rewards": "trainers.episodes",
    "from_verl": "trainers.verl_rewards",
    "group_advantages": "trainers.advantages",
    "kl_estimate": "trainers.losses",
    "kl_loss": "trainers.losses",
    "pack": "trainers.batch",
    "pack_micro_batches": "trainers.batch",
    "policy_loss": "trainers.losses",
    "rank_micro_batches": "trainers.shares",
    "token_logprobs": "kernels.logprobs",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Finds a public name in its module (PEP 562), so that a process that runs rewards does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
