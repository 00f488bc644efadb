"""GRPOConfig: every setting of a GRPO run, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainers.algorithms import algorithm
from trainers.choices import (
    AdvantageBaseline,
    AdvantageScale,
    Aggregation,
    Correction,
    KLEstimator,
    KLPlace,
    Objective,
    RatioLevel,
    require_choice,
)
from trainers.loop_config import LoopConfig, require

CHOICES = {
    "objective": Objective,
    "ratio_level": RatioLevel,
    "loss_aggregation": Aggregation,
    "kl_estimator": KLEstimator,
    "kl_in": KLPlace,
    "advantage_scale": AdvantageScale,
    "advantage_baseline": AdvantageBaseline,
    "correction": Correction,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(LoopConfig):
    """What a GRPO run does; the model and the engine's settings are EngineConfig's."""

    num_iterations: int = 1
    """Optimiser steps on each batch."""
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
    advantage_scale: AdvantageScale = "std"
    """Divide advantages by the standard deviation of the group, of the whole batch, or not at all (Dr. GRPO)."""
    advantage_baseline: AdvantageBaseline = "mean"
    """Compare with the group's mean, with the mean of the sample's siblings (RLOO), or with nothing (REINFORCE++)."""
    whiten_advantages: bool = False
    """Shift and scale the advantages of the batch's tokens to mean 0 and deviation 1 (REINFORCE++)."""
    correction: Correction = "token-truncate"
    """Weights for tokens that an older policy drew (corrections.py); on policy there is nothing to correct."""
    correction_low: float = 0.0
    """Lower bound of the ratio in that correction."""
    correction_high: float = 2.0
    """Upper bound of the ratio in that correction."""
    advantage_epsilon: float = 1e-4
    """Added to the standard deviation."""
    skip_zero_std_groups: bool = True
    """Leave groups whose rewards are all equal out of the training forward."""
    max_refills: int = 0
    """How many times a step draws further prompts in place of groups whose rewards are all equal (DAPO's dynamic
    sampling, arXiv 2503.14476, section 3.2); 0 trains on what is left."""
    check_all_groups: bool = True
    """Compare log-probabilities on the groups that are left out, too: the mismatch is then that of every token."""
    shuffle_rewards: bool = False
    """Deal rewards out at random over the batch: a control that must not learn."""

    @classmethod
    def for_algorithm(cls, name: str, **overrides: Any) -> GRPOConfig:
        """The settings of a published algorithm (algorithms.py), with `overrides` for any field.

        Raises ValueError for an unknown name, listing those there are.
        """
        return cls(**{**algorithm(name).settings, **overrides})

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # slots rule out super() without arguments
        for name, known in CHOICES.items():
            require_choice(name, getattr(self, name), known)
        require(self.num_iterations >= 1, f"num_iterations={self.num_iterations} must be at least 1")
        not_negative = ("kl_coef", "advantage_epsilon", "entropy_coef", "reference_update_every", "max_refills")
        for name in not_negative:
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.clip_high > 0, f"clip_high={self.clip_high} must be above 0")
        if self.max_refills:
            require(
                self.mode != "lagged",
                f'max_refills={self.max_refills} needs mode="sync" or "async": a lagged batch is drawn before the '
                "rewards of the one before it are known",
            )
            require(self.skip_zero_std_groups, f"max_refills={self.max_refills} needs skip_zero_std_groups")
        _check_objective(self)


def _check_objective(config: GRPOConfig) -> None:
    low, high = config.clip_low, config.clip_high
    require(0 < low <= 1, f"clip_low={low} must be above 0 and at most 1")
    if config.dual_clip is not None:
        require(config.objective == "clip", f"dual_clip belongs to objective='clip', not {config.objective!r}")
        require(config.dual_clip > 1 + high, f"dual_clip={config.dual_clip} must be above 1 + clip_high = {1 + high}")
    mixup = config.reference_mixup
    require(0 < mixup <= 1, f"reference_mixup={mixup} must be above 0 and at most 1")
    moves = config.reference_update_every
    require(not moves or config.kl_coef > 0, f"reference_update_every={moves} needs a kl_coef above 0")
    require(
        0 <= config.correction_low <= 1 <= config.correction_high,
        f"correction_low={config.correction_low} and correction_high={config.correction_high} must have 1 between "
        "them, the ratio on policy",
    )
    require(
        not (config.advantage_baseline == "none" and config.skip_zero_std_groups),
        "advantage_baseline='none' learns from groups without spread too: set skip_zero_std_groups=False",
    )
