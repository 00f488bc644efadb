"""ObjectiveConfig: what the policy's loss on a batch is, which GRPO and PPO have in common."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.choices import Aggregation, Correction, KLEstimator, KLPlace, Objective, RatioLevel, require_choice
from trainers.loop_config import LoopConfig, require

CHOICES = {
    "objective": Objective,
    "ratio_level": RatioLevel,
    "loss_aggregation": Aggregation,
    "kl_estimator": KLEstimator,
    "kl_in": KLPlace,
    "correction": Correction,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig(LoopConfig):
    """The settings of objective.py; how advantages come about is the algorithm's own."""

    objective: Objective = "clip"
    """PPO's clipped surrogate, CISPO's clipped weights, or plain REINFORCE; see losses.policy_loss."""
    ratio_level: RatioLevel = "token"
    """The ratio of each token, the geometric mean over its sample (GSPO), or the sample's product (RLOO)."""
    clip_low: float = 0.2
    """The ratio counts no further down than 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts no further up than 1 + clip_high; 0.28 is DAPO's."""
    dual_clip: float | None = None
    """Where the advantage is negative, the ratio counts no further up than this; 3 is usual, None leaves it free."""
    loss_aggregation: Aggregation = "token-mean"
    """How tokens add up to the batch's loss: see losses.token_weights; the norm is max_tokens."""
    entropy_coef: float = 0.0
    """Weight of a bonus for entropy, estimated from the sampled tokens."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference, the model that the run began with; above 0 a copy of it is kept in memory."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of that KL."""
    kl_in: KLPlace = "loss"
    """The KL is a term of the loss, or a penalty that each token takes off the advantages up to its own."""
    reference_update_every: int = 0
    """Optimiser steps after which the reference follows the policy; 0 leaves it as it began."""
    reference_mixup: float = 0.6
    """The policy's share of the reference that follows it; 1 replaces it (TRL's ref_model_mixup_alpha)."""
    whiten_advantages: bool = False
    """Shift and scale the advantages of the batch's tokens to mean 0 and deviation 1 (REINFORCE++)."""
    correction: Correction = "token-truncate"
    """Weights for tokens that an older policy drew (corrections.py); on policy there is nothing to correct."""
    correction_low: float = 0.0
    """Lower bound of the ratio in that correction."""
    correction_high: float = 2.0
    """Upper bound of the ratio in that correction."""

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # slots rule out super() without arguments
        for name, known in CHOICES.items():
            require_choice(name, getattr(self, name), known)
        for name in ("kl_coef", "entropy_coef", "reference_update_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.clip_high > 0, f"clip_high={self.clip_high} must be above 0")
        require(0 < self.clip_low <= 1, f"clip_low={self.clip_low} must be above 0 and at most 1")
        _check_dual_clip(self)
        _check_reference(self)
        require(
            0 <= self.correction_low <= 1 <= self.correction_high,
            f"correction_low={self.correction_low} and correction_high={self.correction_high} must have 1 between "
            "them, the ratio on policy",
        )


def _check_dual_clip(config: ObjectiveConfig) -> None:
    if config.dual_clip is None:
        return
    bound = 1 + config.clip_high
    require(config.objective == "clip", f"dual_clip belongs to objective='clip', not {config.objective!r}")
    require(config.dual_clip > bound, f"dual_clip={config.dual_clip} must be above 1 + clip_high = {bound}")


def _check_reference(config: ObjectiveConfig) -> None:
    mixup, moves = config.reference_mixup, config.reference_update_every
    require(0 < mixup <= 1, f"reference_mixup={mixup} must be above 0 and at most 1")
    require(not moves or config.kl_coef > 0, f"reference_update_every={moves} needs a kl_coef above 0")
