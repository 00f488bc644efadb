"""PPO's options: what `python -m recipes.ppo_math` can be told beside what every recipe can."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from trainers.choices import KLEstimator, KLPlace

from .options import Options, TrainingOptions


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOTrainingOptions(TrainingOptions):
    """How policy and critic learn (PPO)."""

    num_epochs: int = 2
    """Passes over each step's rollouts."""
    num_minibatches: int = 2
    """Parts of a step's rollouts, made of whole prompts, with an update of policy and critic each."""
    gamma: float = 1.0
    """Discount of a reward for each token until it comes."""
    gae_lambda: float = 1.0
    """1 takes advantages from whole samples; lower values trust the critic's values of later tokens instead."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of the step's tokens to mean 0 and deviation 1."""
    kl_in: KLPlace = "reward"
    """Take the KL off each token's reward, or make it a term of the policy's loss."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of that KL."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a sample that was cut off at max_tokens."""
    value_clip: float | None = 0.2
    """Within a step, a value that has moved further than this from where it was learns no more. None lets it."""
    critic_learning_rate: float = 1e-5
    """AdamW's learning rate of the critic."""
    critic_head_learning_rate: float | None = 1e-3
    """That of its value head alone, which begins at zero. None takes critic_learning_rate."""
    critic_warmup_steps: int = 0
    """First steps in which the critic alone learns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOOptions(Options):
    """Trains a language model with PPO on problems whose answers can be checked.

    Every rollout's log-probabilities equal the trainer's bit for bit; the run measures it on every token.
    """

    PROGRAM: ClassVar[str] = "python -m recipes.ppo_math"

    num_steps: int = 30
    """Steps to train: each draws samples, scores them, updates policy and critic and hands the weights over."""
    training: PPOTrainingOptions = PPOTrainingOptions()

    @property
    def title(self) -> str:
        return "PPO"
