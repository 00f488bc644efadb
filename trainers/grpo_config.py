"""GRPOConfig: every setting of a GRPO run, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from trainers.algorithms import algorithm
from trainers.choices import AdvantageBaseline, AdvantageScale, require_choice
from trainers.loop_config import require
from trainers.objective_config import ObjectiveConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class GRPOConfig(ObjectiveConfig):
    """What a GRPO run does; the model and the engine's settings are EngineConfig's."""

    num_iterations: int = 1
    """Optimiser steps on each batch."""
    advantage_scale: AdvantageScale = "std"
    """Divide advantages by the standard deviation of the group, of the whole batch, or not at all (Dr. GRPO)."""
    advantage_baseline: AdvantageBaseline = "mean"
    """Compare with the group's mean, with the mean of the sample's siblings (RLOO), or with nothing (REINFORCE++)."""
    advantage_epsilon: float = 1e-4
    """Added to the standard deviation."""
    skip_zero_std_groups: bool = True
    """Leave groups whose rewards are all equal out of the training forward."""
    max_refills: int = 0
    """How many times a step draws further prompts in place of groups whose rewards are all equal (DAPO's dynamic
    sampling, arXiv 2503.14476, section 3.2); 0 trains on what is left."""
    check_all_groups: bool = True
    """Compare log-probabilities on the groups that are left out, too: the mismatch is then that of every token."""

    @property
    def updates_per_step(self) -> int:
        return self.num_iterations

    @classmethod
    def for_algorithm(cls, name: str, **overrides: Any) -> GRPOConfig:
        """The settings of a published algorithm (algorithms.py), with `overrides` for any field.

        Raises ValueError for an unknown name, listing those there are.
        """
        return cls(**{**algorithm(name).settings, **overrides})

    def __post_init__(self) -> None:
        ObjectiveConfig.__post_init__(self)  # slots rule out super() without arguments
        require_choice("advantage_scale", self.advantage_scale, AdvantageScale)
        require_choice("advantage_baseline", self.advantage_baseline, AdvantageBaseline)
        require(self.num_iterations >= 1, f"num_iterations={self.num_iterations} must be at least 1")
        for name in ("advantage_epsilon", "max_refills"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        if self.max_refills:
            require(
                self.mode != "lagged",
                f'max_refills={self.max_refills} needs mode="sync" or "async": a lagged batch is drawn before the '
                "rewards of the one before it are known",
            )
            require(self.skip_zero_std_groups, f"max_refills={self.max_refills} needs skip_zero_std_groups")
        require(
            not (self.advantage_baseline == "none" and self.skip_zero_std_groups),
            "advantage_baseline='none' learns from groups without spread too: set skip_zero_std_groups=False",
        )
