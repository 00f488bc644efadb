"""GRPOConfig: every setting of a GRPO run, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from trainers.loop_config import LoopConfig, require
from trainers.losses import KLEstimator


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(LoopConfig):
    """What a GRPO run does; the model and the engine's settings are EngineConfig's."""

    num_iterations: int = 1
    """Optimiser steps on each batch."""
    clip_low: float = 0.2
    """The ratio counts no further down than 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio counts no further up than 1 + clip_high; 0.28 is DAPO's."""
    kl_coef: float = 0.0
    """Weight of the KL to the model that the run began with; above 0 a copy of it is kept in memory."""
    kl_estimator: KLEstimator = "k3"
    """Estimator of that KL."""
    loss_aggregation: Literal["token-mean", "seq-mean-token-sum-norm"] = "token-mean"
    """Mean over all trained tokens of the batch (DAPO), or sum over samples x max_tokens (Dr. GRPO)."""
    advantage_scale: Literal["std", "none"] = "std"
    """Divide advantages by the group's standard deviation, or not (Dr. GRPO)."""
    advantage_baseline: Literal["mean", "leave_one_out"] = "mean"
    """Compare with the group's mean, or with the mean of the sample's siblings (RLOO)."""
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

    def __post_init__(self) -> None:
        LoopConfig.__post_init__(self)  # slots rule out super() without arguments
        require(self.num_iterations >= 1, f"num_iterations={self.num_iterations} must be at least 1")
        for name in ("kl_coef", "advantage_epsilon", "max_refills"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        require(self.clip_high > 0, f"clip_high={self.clip_high} must be above 0")
        require(0 < self.clip_low <= 1, f"clip_low={self.clip_low} must be above 0 and at most 1")
        if self.max_refills:
            require(
                self.mode != "lagged",
                f'max_refills={self.max_refills} needs mode="sync" or "async": a lagged batch is drawn before the '
                "rewards of the one before it are known",
            )
            require(self.skip_zero_std_groups, f"max_refills={self.max_refills} needs skip_zero_std_groups")
