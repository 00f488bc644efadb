"""GRPOConfig: every setting of a GRPO run, checked once when it is made."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from trainers.losses import KLEstimator

TrainerParallelism = Literal["ddp", "fsdp"]


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
    """CPU threads of each trainer rank; None shares out every core."""
    num_trainer_ranks: int = 1
    """Trainer processes that share a step's samples; their gradients add up."""
    trainer_parallelism: TrainerParallelism = "ddp"
    """What several ranks hold: "ddp" all of the model each, "fsdp" shares of masters, gradients and moments."""
    trainer_timeout: float = 600.0
    """Seconds that a trainer rank waits for the others in one exchange before the run ends."""
    gradient_checkpointing: bool = False
    """Compute each layer a second time in the backward pass and keep only its input: less memory, the same bits."""
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

    def __post_init__(self) -> None:
        positive = ("num_prompts", "group_size", "num_iterations", "max_tokens", "num_engines", "micro_batch_tokens")
        for name in (*positive, "num_trainer_ranks"):
            _require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        not_negative = ("num_steps", "warmup_steps", "eval_every", "weight_decay", "kl_coef", "advantage_epsilon")
        for name in (*not_negative, "reward_processes"):
            _require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("learning_rate", "max_grad_norm", "clip_high", "reward_timeout", "trainer_timeout"):
            _require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        _require(0 < self.clip_low <= 1, f"clip_low={self.clip_low} must be above 0 and at most 1")
        _require(self.temperature > 0, f"temperature={self.temperature} must be above 0: greedy groups have no spread")
        if self.journal_dir is None:
            for name in ("keep_weights_every", "keep_last"):
                _require(getattr(self, name) is None, f"{name}={getattr(self, name)} needs a journal_dir")
        known = get_args(TrainerParallelism)
        _require(
            self.trainer_parallelism in known,
            f"trainer_parallelism={self.trainer_parallelism!r} must be one of {', '.join(map(repr, known))}",
        )
        threads = self.num_threads
        _require(threads is None or threads >= 1, f"num_threads={threads} must be at least 1, or None for every core")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
