"""LoopConfig: the settings that every training loop has, checked once when they are made."""

from __future__ import annotations

from dataclasses import dataclass

from trainers.choices import LoopMode, RunningSamples, StaleGroups, TrainerParallelism, require_choice
from trainers.schedule import LearningRateSchedule, check_schedule


@dataclass(frozen=True, slots=True, kw_only=True)
class LoopConfig:
    """What GRPO and PPO runs have in common; the model and the engine's settings are EngineConfig's."""

    num_steps: int = 60
    """Rollout batches to train on."""
    num_prompts: int = 16
    """Prompts of a batch."""
    group_size: int = 8
    """Samples of each prompt."""

    mode: LoopMode = "sync"
    """"sync" draws and trains in turns. "lagged" draws each batch wholly under the weights that are max_staleness
    versions older, while the trainer works; such a run repeats to the bit. "async" draws all the time: samples go on
    under new weights, and no token is more than max_staleness versions old."""
    max_staleness: int = 1
    """In the modes "lagged" and "async": how many versions a token lies behind, or may."""
    on_stale: StaleGroups = "redraw"
    """In the mode "async": what is too old all the same is drawn again, or dropped, and counted."""
    sync_mode: RunningSamples = "recompute"
    """In the mode "async": what becomes of running samples when new weights come, see RolloutPool.sync_weights."""
    check_stale_tokens: bool = True
    """Compare the log-probabilities of older versions' tokens too, each under its version: costs a forward for each
    version and a packed copy of its weights."""

    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that hold this mass; 1 draws from all. What is drawn from less than the whole
    distribution is weighted by the mass that could be drawn (corrections.truncation_weights)."""
    top_k: int = 0
    """Draw from so many of the likeliest tokens; 0 draws from all."""
    min_p: float = 0.0
    """Draw from tokens at least this share as likely as the likeliest; 0 draws from all."""
    max_tokens: int = 5
    """Longest completion, in tokens."""
    stop: tuple[str, ...] = ("\n",)
    """Texts that end a completion; their tokens are trained."""
    overlong_buffer_tokens: int = 0
    """The last tokens before max_tokens in which a completion's reward falls by up to 1 (DAPO's soft overlong
    punishment, arXiv 2503.14476, eq. 13); 0 takes nothing off."""

    learning_rate: float = 3e-6
    """AdamW's learning rate after warm-up."""
    warmup_steps: int = 3
    """Optimiser steps over which the learning rate rises linearly."""
    learning_rate_schedule: LearningRateSchedule = "constant"
    """After warm-up the learning rate stays, or falls to nothing at the run's end, on a line or half a cosine wave."""
    betas: tuple[float, float] = (0.9, 0.99)
    """AdamW's decay rates of the two moments."""
    weight_decay: float = 0.0
    """AdamW's weight decay."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""

    reward_timeout: float = 30.0
    """Seconds that a reward function may take over the samples of one prompt, and over each alone if that fails."""
    reward_processes: int = 1
    """Processes that run reward functions and can be killed; 0 runs them in the trainer's own."""
    shuffle_rewards: bool = False
    """Deal rewards out at random over the batch: a control that must not learn."""

    num_engines: int = 1
    """Engine actors that generate."""
    engine_gpus: float | None = None
    """GPUs that Ray reserves for each engine, or a part of one, of whose memory the engine then takes its part. None
    shares this machine's evenly with the trainer where the engines' device is a GPU, and reserves none elsewhere."""
    trainer_gpus: float | None = None
    """Likewise for the trainer."""
    num_threads: int | None = None
    """CPU threads of each trainer rank; None shares out every core."""
    num_trainer_ranks: int = 1
    """Trainer processes that share a batch's samples; their gradients add up (docs/trainer_ranks.md)."""
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
    """Steps between evaluations; the first is before the first step, the last after the last."""
    num_eval_samples: int = 0
    """Samples of each held-out prompt for eval/pass@1 and eval/pass@k; 0 measures the expected reward alone."""
    right_reward: float = 1.0
    """The least total reward of a sample that counts as right for pass@k."""
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
    checkpoint_dir: str | None = None
    """Where checkpoints are left, from which a run that ended goes on (docs/checkpoints.md)."""
    checkpoint_every: int = 0
    """Steps from one checkpoint to the next; the last step has one, too. 0 makes none."""
    keep_checkpoints: int = 2
    """Complete checkpoints that stay; older ones are removed after a new one is complete."""
    resume: str | None = None
    """A checkpoint to go on from, or "auto": the newest good one in checkpoint_dir, if there is any."""

    def __post_init__(self) -> None:
        positive = ("num_prompts", "group_size", "max_tokens", "num_engines", "micro_batch_tokens", "max_staleness")
        for name in (*positive, "num_trainer_ranks"):
            require(getattr(self, name) >= 1, f"{name}={getattr(self, name)} must be at least 1")
        not_negative = ("num_steps", "warmup_steps", "eval_every", "weight_decay", "num_eval_samples")
        for name in (*not_negative, "reward_processes", "checkpoint_every"):
            require(getattr(self, name) >= 0, f"{name}={getattr(self, name)} must not be negative")
        for name in ("learning_rate", "max_grad_norm", "reward_timeout", "trainer_timeout"):
            require(getattr(self, name) > 0, f"{name}={getattr(self, name)} must be above 0")
        for name in ("engine_gpus", "trainer_gpus"):
            gpus = getattr(self, name)
            require(
                gpus is None or 0 <= gpus <= 1 or gpus == int(gpus) > 1,
                f"{name}={gpus} must be a part of a GPU (0 to 1), a whole number of them, or None for an even share",
            )
        buffer = self.overlong_buffer_tokens
        require(
            0 <= buffer <= self.max_tokens,
            f"overlong_buffer_tokens={buffer} must be between 0 and max_tokens={self.max_tokens}",
        )
        require_choice("mode", self.mode, LoopMode)
        require_choice("on_stale", self.on_stale, StaleGroups)
        require_choice("sync_mode", self.sync_mode, RunningSamples)
        require_choice("trainer_parallelism", self.trainer_parallelism, TrainerParallelism)
        require(self.temperature > 0, f"temperature={self.temperature} must be above 0: greedy samples are all alike")
        require(0 < self.top_p <= 1, f"top_p={self.top_p} must be above 0 and at most 1")
        require(0 <= self.min_p <= 1, f"min_p={self.min_p} must be between 0 and 1")
        require(self.top_k >= 0, f"top_k={self.top_k} must not be negative; 0 draws from all tokens")
        require(
            self.temperature == 1 or not self.is_truncated,
            f"temperature={self.temperature} must be 1 with top_p, top_k or min_p: an engine reports the whole "
            "distribution's log-probabilities, which a trainer compares with its own, at temperature 1",
        )
        if self.journal_dir is None:
            for name in ("keep_weights_every", "keep_last"):
                require(getattr(self, name) is None, f"{name}={getattr(self, name)} needs a journal_dir")
        threads = self.num_threads
        require(threads is None or threads >= 1, f"num_threads={threads} must be at least 1, or None for every core")
        check_schedule(self.learning_rate_schedule, self.num_optimizer_steps)
        require(self.keep_checkpoints >= 1, f"keep_checkpoints={self.keep_checkpoints} must be at least 1")
        if self.checkpoint_dir is None:
            require(not self.checkpoint_every, f"checkpoint_every={self.checkpoint_every} needs a checkpoint_dir")
            require(self.resume != "auto", "resume='auto' needs a checkpoint_dir to look in")

    @property
    def updates_per_step(self) -> int:
        """Optimiser steps of the policy on one batch."""
        raise NotImplementedError

    @property
    def num_optimizer_steps(self) -> int:
        """Over the whole run, steps without anything to train on included."""
        return self.num_steps * self.updates_per_step

    @property
    def is_truncated(self) -> bool:
        """Whether samples are drawn from less than the whole distribution."""
        return (self.top_p, self.top_k, self.min_p) != (1.0, 0, 0.0)

    @property
    def max_lag(self) -> int:
        """Versions that a token may lie behind the trainer's."""
        return 0 if self.mode == "sync" else self.max_staleness


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
