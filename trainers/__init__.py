"""Trainers: turns rollouts into better weights - packing, advantages, losses, the Policy and the GRPO loop."""

from __future__ import annotations

from kernels.logprobs import token_logprobs
from trainers.advantages import group_advantages
from trainers.batch import PackedBatch, pack, pack_micro_batches
from trainers.episodes import episode_metrics, episode_rewards
from trainers.grpo import GRPOTrainer
from trainers.grpo_config import GRPOConfig
from trainers.losses import LossOutput, kl_estimate, kl_loss, policy_loss
from trainers.policy import Policy

__all__ = [
    "GRPOConfig",
    "GRPOTrainer",
    "LossOutput",
    "PackedBatch",
    "Policy",
    "episode_metrics",
    "episode_rewards",
    "group_advantages",
    "kl_estimate",
    "kl_loss",
    "pack",
    "pack_micro_batches",
    "policy_loss",
    "token_logprobs",
]
