"""Trainers: turns rollouts into better weights - packing, advantages, losses, Policy and Critic, GRPO and PPO."""

from __future__ import annotations

import importlib

_HOMES = {
    "ALGORITHMS": "trainers.algorithms",
    "Critic": "trainers.critic",
    "CheckpointError": "trainers.checkpoint",
    "CheckpointFolder": "trainers.checkpoint",
    "GRPOConfig": "trainers.grpo_config",
    "GRPOTrainer": "trainers.grpo",
    "LossOutput": "trainers.losses",
    "PPOConfig": "trainers.ppo_config",
    "PPOTrainer": "trainers.ppo",
    "PackedBatch": "trainers.batch",
    "Policy": "trainers.policy",
    "PromptOrder": "trainers.prompt_order",
    "RewardScorer": "trainers.rewards",
    "Rewards": "trainers.rewards",
    "TrainerRankError": "trainers.trainer_group",
    "algorithm": "trainers.algorithms",
    "correction_weights": "trainers.corrections",
    "discounted_returns": "trainers.gae",
    "effective_sample_size": "trainers.corrections",
    "entropy_loss": "trainers.losses",
    "episode_metrics": "trainers.episodes",
    "episode_rewards": "trainers.episodes",
    "explained_variance": "trainers.gae",
    "from_verl": "trainers.verl_rewards",
    "gae_advantages": "trainers.gae",
    "group_advantages": "trainers.advantages",
    "kl_estimate": "trainers.losses",
    "kl_loss": "trainers.losses",
    "overlong_penalty": "trainers.penalties",
    "pack": "trainers.batch",
    "pack_micro_batches": "trainers.batch",
    "packed_gae": "trainers.gae",
    "policy_loss": "trainers.losses",
    "policy_ratio": "trainers.losses",
    "rank_micro_batches": "trainers.shares",
    "staleness_metrics": "trainers.corrections",
    "token_logprobs": "kernels.logprobs",
    "token_rewards": "trainers.penalties",
    "token_staleness": "trainers.corrections",
    "token_weights": "trainers.losses",
    "truncation_weights": "trainers.corrections",
    "untruncated_logprobs": "trainers.corrections",
    "value_loss": "trainers.losses",
    "whiten": "trainers.advantages",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Finds a public name in its module (PEP 562), so that a process that runs rewards does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'trainers' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
