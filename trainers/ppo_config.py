"""PPOConfig: every setting of a PPO run, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.choices import KLEstimator, KLPlace
from trainers.loop_config import require
from trainers.objective_config import ObjectiveConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class PPOConfig(ObjectiveConfig):
    """What a PPO run does; the model and the engine's settings are EngineConfig's."""

    num_steps: int = 30
    """Rollout batches to train on: half of GRPO's, each with several updates."""
    num_epochs: int = 2
    """Passes over each batch."""
    num_minibatches: int = 2
    """Parts of a batch, made of whole prompts, with an update of policy and critic each."""

    gamma: float = 1.0
    """Discount of a reward for each token until it comes."""
    gae_lambda: float = 1.0
    """1 takes advantages from whole samples; lower values trust the critic's values of later tokens instead."""
    whiten_advantages: bool = True
    """Shift and scale the advantages of the batch's tokens to mean 0 and deviation 1."""
    kl_in: KLPlace = "reward"
    """The KL is taken off each token's reward, which the critic then expects, or is a term of the policy's loss."""
    kl_estimator: KLEstimator = "k1"
    """Estimator of that KL."""
    missing_eos_penalty: float = 0.0
    """Taken off the reward of a sample that was cut off at max_tokens."""

    value_clip: float | None = 0.2
    """Within a batch, a value that has moved further than this from where it was learns no more; None lets it."""
    critic_learning_rate: float = 1e-5
    """AdamW's learning rate of the critic; warm-up and all else are as the policy's."""
    critic_head_learning_rate: float | None = 1e-3
    """That of its value head alone, which begins at zero; None takes critic_learning_rate."""
    critic_warmup_steps: int = 0
    """First steps in which the critic alone learns, so that the policy starts with a baseline."""

    check_all_groups: bool = True
    """Compare the log-probabilities of all minibatches before the first update, at the cost of a forward."""

    @property
    def updates_per_step(self) -> int:
        return self.num_epochs * self.num_minibatches

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots rule out super() without arguments
        for name in ("num_epochs", "num_minibatches"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        for name in ("gamma", "gae_lambda"):
            require(0 <= getattr(self, name) <= 1, f"{name}={getattr(self, name)} must be between 0 and 1")
        for name in ("critic_warmup_steps", "missing_eos_penalty"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("critic_learning_rate", "critic_head_learning_rate", "value_clip"):
            value = getattr(self, name)
            require(value is None or value > 0, f"{name}={value} must be above 0")
        require(
            self.num_minibatches <= self.num_prompts,
            f"num_minibatches={self.num_minibatches} must be at most num_prompts={self.num_prompts}: the samples of a "
            "prompt stay together",
        )
