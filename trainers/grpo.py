"""GRPO: the training loop, from prompts to synchronised weights, read from top to bottom."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from rollout import EngineConfig, Rollout, RolloutPool, SamplingParams
from trainers.advantages import group_advantages, has_spread, shuffle_rewards
from trainers.grpo_config import GRPOConfig
from trainers.metrics import PhaseTimer, response_metrics, reward_metrics
from trainers.prompt_order import PromptOrder
from trainers.reward_calls import RewardFunction, require_columns
from trainers.rewards import Rewards, RewardScorer
from trainers.run_checkpoints import RunCheckpoints
from trainers.trainer_actor import start_trainer_actor

Row = Mapping[str, Any]
Callback = Callable[[dict[str, float]], None]

STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The latest step's rollouts and what they were worth, for callbacks that show or keep them."""

    rows: Sequence[Row]  # one per group
    groups: Sequence[Sequence[Rollout]]  # P groups of G
    rewards: Rewards
    advantages: torch.Tensor  # [P, G] float32


class GRPOTrainer:
    """Group relative policy optimisation (arXiv 2402.03300) on exact on-policy rollouts.

    rows: dictionaries with a `prompt` (text, token ids or chat messages); further columns go to the reward functions.
    reward_functions: f(prompts, completions, **columns) -> list of float or None, sync or async (see rewards.py).
    eval_rows: held-out rows with an `answer` (see answer_template) or `right_completions` (a text or list of texts).
    callbacks: called with the metrics of each step, and before the first step with those of step 0; `batch` and
    `environment` of this object then hold what belongs to them. on_phase is called with the name of each phase
    ("rollout", "reward", "train", "weight_sync", "eval", "checkpoint") as it begins.
    settings: what else the bits of the run depend on (the rewards, say), by name, which a resumed run must share.

    With `config.resume`, `checkpoints.start` is where the run goes on (docs/checkpoints.md).
    Raises ValueError for a mistake of the caller's, CheckpointError for a checkpoint that is not whole.
    """

    def __init__(
        self,
        config: GRPOConfig,
        engine_config: EngineConfig,
        rows: Sequence[Row],
        reward_functions: RewardFunction | Sequence[RewardFunction],
        eval_rows: Sequence[Row] | None = None,
        callbacks: Sequence[Callback] = (),
        on_phase: Callable[[str], None] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.engine_config = config, engine_config
        self.reward_functions = [reward_functions] if callable(reward_functions) else list(reward_functions)
        self.rows = _checked_rows(rows)
        require_columns(self.reward_functions, {name for row in self.rows for name in row if name != "prompt"})
        self.eval_rows = eval_rows or ()
        self.right_completions = [_right_completions(row, config.answer_template) for row in self.eval_rows]
        self.callbacks, self.on_phase = tuple(callbacks), on_phase
        self.sampling_params = SamplingParams(
            n=config.group_size, temperature=config.temperature, max_tokens=config.max_tokens, stop=config.stop
        )
        self.checkpoints = RunCheckpoints(config, self.rows, settings)
        self.batch: Batch | None = None
        self.environment: dict[str, Any] = {}

    def train(self) -> list[dict[str, float]]:
        """Run every step; returns the metrics of each, step 0 (the untrained model) first.

        A run that goes on from a checkpoint has the metrics of the steps after it, and no step 0.
        Ctrl-C and SIGTERM raise KeyboardInterrupt here, after engines and trainer have been shut down.
        """
        config = self.config
        with (
            self._scorer() as scorer,
            self._pool() as pool,
            _sigterm_as_interrupt(),
            _trainer_actor(config, pool) as trainer,
        ):
            self.environment = self._environment(pool, trainer)
            order = self._resume(pool, trainer)
            history = [] if self.checkpoints.resumed else [self._report(self._evaluate(0, trainer))]
            for step in range(self.checkpoints.start.step + 1, config.num_steps + 1):
                rows = [self.rows[index] for index in order.take(config.num_prompts)]
                metrics = self._step(step, rows, pool, trainer, scorer)
                history.append(self._report(metrics | self._evaluate(step, trainer)))
                self._save_checkpoint(step, order, trainer)  # after its metrics are out: a resume does not repeat them
            self._save_weights(trainer)
        return history

    def _step(
        self, step: int, rows: Sequence[Row], pool: RolloutPool, trainer: Any, scorer: RewardScorer
    ) -> dict[str, float]:
        timer = PhaseTimer(self.on_phase)
        with timer("rollout"):
            group_ids = [f"step{step}-prompt{p}" for p in range(len(rows))]
            groups = pool.generate([row["prompt"] for row in rows], self.sampling_params, group_ids=group_ids)
        with timer("reward"):
            rewards = scorer.score(rows, groups)
            total = self._shuffled(rewards.total, step) if self.config.shuffle_rewards else rewards.total
            advantages = self._advantages(total)
        with timer("train"):
            actor_metrics = _ask(trainer.step, *self._select(groups, total, advantages))
        with timer("weight_sync"):
            sync_metrics = self._sync(pool, trainer, actor_metrics["policy_version"])
        self.batch = Batch(rows=rows, groups=groups, rewards=rewards, advantages=advantages)
        rollouts = [rollout for group in groups for rollout in group]
        return {
            "step": step,
            **reward_metrics(rewards),
            **response_metrics(rollouts),
            **actor_metrics,
            **sync_metrics,
            **timer.metrics(),
            "perf/rollout_tokens_per_second": sum(len(r.token_ids) for r in rollouts) / timer.seconds["rollout"],
            "perf/train_tokens_per_second": actor_metrics["actor/num_rows"] / timer.seconds["train"],
            "perf/engine_num_threads": self.environment["engine"]["num_threads"],
            "perf/trainer_num_threads": self.environment["trainer"]["num_threads"],
        }

    def _pool(self) -> RolloutPool:
        config = self.config
        return RolloutPool(
            self.engine_config,
            num_engines=config.num_engines,
            seed=config.seed,
            journal=config.journal_dir,
            keep_weights_every=config.keep_weights_every,
            keep_last=config.keep_last,
        )

    def _scorer(self) -> RewardScorer:
        config = self.config
        return RewardScorer(self.reward_functions, num_processes=config.reward_processes, timeout=config.reward_timeout)

    def _shuffled(self, total: torch.Tensor, step: int) -> torch.Tensor:
        return shuffle_rewards(total, torch.Generator().manual_seed(self.config.seed * 1_000_003 + step))

    def _advantages(self, total: torch.Tensor) -> torch.Tensor:
        config = self.config
        return group_advantages(
            total,
            epsilon=config.advantage_epsilon,
            scale=config.advantage_scale,
            baseline=config.advantage_baseline,
        )

    def _select(
        self, groups: Sequence[Sequence[Rollout]], total: torch.Tensor, advantages: torch.Tensor
    ) -> tuple[list[Rollout], list[float], list[Rollout]]:
        """The samples to train on with their advantages, and those only to be checked."""
        is_trained = ~total.isnan()
        if self.config.skip_zero_std_groups:
            is_trained &= has_spread(total)[:, None]
        trained, trained_advantages, left_out = [], [], []
        for group, flags, values in zip(groups, is_trained.tolist(), advantages.tolist(), strict=True):
            for rollout, flag, advantage in zip(group, flags, values, strict=True):
                if flag:
                    trained.append(rollout)
                    trained_advantages.append(advantage)
                else:
                    left_out.append(rollout)
        return trained, trained_advantages, left_out if self.config.check_all_groups else []

    def _sync(self, pool: RolloutPool, trainer: Any, policy_version: int) -> dict[str, float]:
        if policy_version == pool.policy_version:  # the optimiser rested
            return {}
        report = _ask(trainer.sync)
        return {"weight_sync/bytes": report.bytes, "weight_sync/pause_seconds": max(report.pause_seconds)}

    def _evaluate(self, step: int, trainer: Any) -> dict[str, float]:
        """The expected reward where it is due, by name; step 0 always reports its number."""
        every = self.config.eval_every
        is_due = step in (0, self.config.num_steps) or (every > 0 and step % every == 0)
        metrics: dict[str, float] = {} if step else {"step": 0}
        if is_due and self.eval_rows:
            timer = PhaseTimer(self.on_phase)
            with timer("eval"):
                prompts = [row["prompt"] for row in self.eval_rows]
                expected_reward = _ask(trainer.expected_reward, prompts, self.right_completions)
            metrics |= {"eval/expected_reward": expected_reward, "timing_s/eval": timer.seconds["eval"]}
        return metrics

    def _resume(self, pool: RolloutPool, trainer: Any) -> PromptOrder:
        """Trainer, engines and the order of prompts as they were at the checkpoint to go on from, if there is one."""
        info = pool.engine_info
        self.checkpoints.require({
            "kernel_fingerprint": info.kernel_fingerprint,
            "model_checksum": info.weights_checksum.hex(),  # of the model that the run began with
            "max_model_len": info.max_model_len,
        })  # fmt: skip
        self.checkpoints.load({"policy": lambda *saved: _ask(trainer.load_checkpoint, *saved)})
        self._sync(pool, trainer, self.checkpoints.start.policy_version)
        order = PromptOrder(len(self.rows), self.config.seed)
        order.seek(self.checkpoints.start.prompt_position)
        return order

    def _save_checkpoint(self, step: int, order: PromptOrder, trainer: Any) -> None:
        if self.checkpoints.is_due(step):
            with PhaseTimer(self.on_phase)("checkpoint"):
                self.checkpoints.save(
                    step=step,
                    prompt_position=order.position,
                    parts={"policy": lambda directory: _ask(trainer.save_checkpoint, directory)},
                    num_bytes=_ask(trainer.checkpoint_num_bytes),
                )

    def _environment(self, pool: RolloutPool, trainer: Any) -> dict[str, Any]:
        return {
            "engine": {
                "num_engines": len(pool.engine_infos),
                "num_threads": pool.engine_info.num_threads,
                "max_model_len": pool.engine_info.max_model_len,
                "kernel_fingerprint": pool.kernel_fingerprint,
            },
            "trainer": _ask(trainer.environment),
        }

    def _report(self, metrics: dict[str, float]) -> dict[str, float]:
        for callback in self.callbacks:
            callback(metrics)
        return metrics

    def _save_weights(self, trainer: Any) -> None:
        if self.config.output_dir is not None:
            directory = Path(self.config.output_dir).absolute() / "weights"
            _ask(trainer.save_pretrained, str(directory))


@contextmanager
def _trainer_actor(config: GRPOConfig, pool: RolloutPool) -> Iterator[Any]:
    trainer = start_trainer_actor(config, pool.handle())
    try:
        yield trainer
    finally:
        ray.kill(trainer)
        ray.wait([trainer.__ray_ready__.remote()], timeout=STOP_SECONDS)  # ends when Ray knows that it is dead


def _ask(method: Any, *arguments: Any) -> Any:
    """Calls a method of the trainer actor; what it raises is raised here as it was there."""
    try:
        return ray.get(method.remote(*arguments))
    except RayTaskError as error:
        raise error.cause from error


@contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """While inside, SIGTERM raises KeyboardInterrupt as Ctrl-C does, so that every `finally` runs."""
    if threading.current_thread() is not threading.main_thread():  # only the main thread may set a handler
        yield
        return

    def interrupt(signum: int, frame: Any) -> None:
        raise KeyboardInterrupt(f"signal {signum}")

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _checked_rows(rows: Sequence[Row]) -> list[Row]:
    if not len(rows):
        raise ValueError("the data set has no rows")
    for i, row in enumerate(rows):
        if "prompt" not in row:
            raise ValueError(f"row {i} of the data set has the columns {sorted(row)}, but no `prompt`")
    return list(rows)


def _right_completions(row: Row, answer_template: str) -> str | Sequence[str]:
    if "right_completions" in row:
        return row["right_completions"]
    if "answer" not in row:
        raise ValueError(f"an evaluation row needs `answer` or `right_completions`; it has {sorted(row)}")
    return answer_template.format(answer=row["answer"])
