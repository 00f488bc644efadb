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
class GRPOConfig:
    """What a GRPO run does; the model and the engine's settings are EngineConfig's."""

    num_steps: int = 60
    """Rollout batches to train on."""
    num_prompts: int = 16
    """Prompts of a batch."""
    group_size: int = 8
    """Samples of each prompt."""
    num_iterations: int = 1
    """Optimiser steps on each batch."""

    temperature: float = 1.0
    """Sampling temperature."""
    max_tokens: int = 5
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end a completion; their tokens are trained."""

    learning_rate: float = 3e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = 3
    """Optimiser steps over which the learning rate rises linearly."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""

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
    check_all_groups: bool = True
    """Compare log-probabilities on the groups that are left out, too: the mismatch is then that of every token."""
    shuffle_rewards: bool = False
    """Deal rewards out at random over the batch: a control that must not learn."""

    reward_timeout: float = 30.0
    """Seconds that a reward function may take over the samples of one prompt, and over each alone if that fails."""
    reward_processes: int = 1
    """Processes that run reward functions and can be killed; 0 runs them in the trainer's own."""

    num_engines: int = 1
    """Engine actors that generate."""
    num_threads: int | None = None
    """CPU threads of the trainer; None takes every core."""
    micro_batch_tokens: int = 1024
    """Rows of one training forward; bounds its memory."""
    share_prompts: bool = True
    """Compute a group's prompt once in the training forward."""
    seed: int = 0
    """Seed of the order of prompts and of every sample."""
    eval_every: int = 10
    """Steps between measurements of the expected reward; it is always measured before the first and after the last."""
    answer_template: str = " {answer}\n"
    """The completion that counts as right where an evaluation row has no `right_completions` of its own."""
    output_dir: str | None = None
    """The trained weights are left in its folder `weights`, in Hugging Face format."""
    journal_dir: str | None = None
    """Where every group and every switch of weights is written down, for `python -m rollout.replay`."""
    keep_weights_every: int | None = None
    """Versions that it divides are kept in the journal's directory, to be drawn from again; None keeps none."""
    keep_last: int | None = None
    """Of the versions kept, only so many of the latest stay; None is all."""

    @classmethod
    def for_algorithm(cls, name: str, **overrides: Any) -> GRPOConfig:
        """The settings of a published algorithm (algorithms.py), with `overrides` for any field.

        Raises ValueError for an unknown name, listing those there are.
        """
        return cls(**{**algorithm(name).settings, **overrides})

    def __post_init__(self) -> None:
        for name, known in CHOICES.items():
            require_choice(name, getattr(self, name), known)
        positive = ("num_prompts", "group_size", "num_iterations", "max_tokens", "num_engines", "micro_batch_tokens")
        for name in positive:
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        not_negative = ("num_steps", "warmup_steps", "eval_every", "weight_decay", "kl_coef", "advantage_epsilon")
        for name in (*not_negative, "entropy_coef", "reference_update_every", "reward_processes"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("learning_rate", "max_grad_norm", "clip_high", "reward_timeout"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        _require(self.temperature > 0, f"temperature={self.temperature} must be above 0: greedy groups have no spread")
        if self.journal_dir is None:
            for name in ("keep_weights_every", "keep_last"):
                _require(getattr(self, name) is None, f"{name}={getattr(self, name)} needs a journal_dir")
        threads = self.num_threads
        _require(threads is None or threads >= 1, f"num_threads={threads} must be at least 1, or None for every core")
        _check_objective(self)


def _check_objective(config: GRPOConfig) -> None:
    low, high = config.clip_low, config.clip_high
    _require(0 < low <= 1, f"clip_low={low} must be above 0 and at most 1")
    if config.dual_clip is not None:
        _require(config.objective == "clip", f"dual_clip belongs to objective='clip', not {config.objective!r}")
        _require(config.dual_clip > 1 + high, f"dual_clip={config.dual_clip} must be above 1 + clip_high = {1 + high}")
    mixup = config.reference_mixup
    _require(0 < mixup <= 1, f"reference_mixup={mixup} must be above 0 and at most 1")
    moves = config.reference_update_every
    _require(not moves or config.kl_coef > 0, f"reference_update_every={moves} needs a kl_coef above 0")
    _require(
        0 <= config.correction_low <= 1 <= config.correction_high,
        f"correction_low={config.correction_low} and correction_high={config.correction_high} must have 1 between "
        "them, the ratio on policy",
    )
    _require(
        not (config.advantage_baseline == "none" and config.skip_zero_std_groups),
        "advantage_baseline='none' learns from groups without spread too: set skip_zero_std_groups=False",
    )


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
