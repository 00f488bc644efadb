"""Loop: what the trainers' loops share - engines, trainer and rewards started and ended, steps, evaluation, reports."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayTaskError

from rollout import EngineConfig, Rollout, RolloutPool, SamplingParams
from trainers.advantages import shuffle_rewards
from trainers.corrections import staleness_metrics
from trainers.evaluation import Evaluator
from trainers.gpu_shares import GPUShares
from trainers.loop_config import LoopConfig
from trainers.metrics import PhaseTimer, response_metrics, reward_metrics
from trainers.penalties import overlong_penalty
from trainers.ranks import require_ranks_on_cpu
from trainers.reward_calls import RewardFunction, require_columns
from trainers.rewards import Rewards, RewardScorer
from trainers.rollout_source import (
    Drawn,
    InFlightSource,
    LaggedSource,
    RolloutSource,
    Row,
    SourceState,
    SynchronousSource,
)
from trainers.run_checkpoints import RunCheckpoints
from trainers.trainer_actor import start_trainer_actor
from trainers.trainer_group import start_trainer_group

Callback = Callable[[dict[str, float]], None]

STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """The latest step's rollouts and what they were worth, for callbacks that show or keep them."""

    rows: Sequence[Row]  # one per group
    groups: Sequence[Sequence[Rollout]]  # P groups of G
    rewards: Rewards
    advantages: torch.Tensor  # [P, G] float32


@dataclass(frozen=True, slots=True, kw_only=True)
class Crew:
    """The actors and processes that work on a run."""

    pool: RolloutPool
    trainer: Any  # Ray actor
    scorer: RewardScorer
    source: RolloutSource


class TrainingLoop:
    """What GRPO and PPO have in common; each adds its own `train_step`.

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
        config: LoopConfig,
        engine_config: EngineConfig,
        rows: Sequence[Row],
        reward_functions: RewardFunction | Sequence[RewardFunction],
        eval_rows: Sequence[Row] | None = None,
        callbacks: Sequence[Callback] = (),
        on_phase: Callable[[str], None] | None = None,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        self.config, self.engine_config = config, engine_config
        require_ranks_on_cpu(config.num_trainer_ranks, engine_config.device_name)
        self.gpu_shares = GPUShares.from_config(config, engine_config)
        self.reward_functions = [reward_functions] if callable(reward_functions) else list(reward_functions)
        self.rows = _checked_rows(rows)
        require_columns(self.reward_functions, {name for row in self.rows for name in row if name != "prompt"})
        self.evaluator = Evaluator(eval_rows or (), config)
        self.callbacks, self.on_phase = tuple(callbacks), on_phase
        self.sampling_params = SamplingParams(
            n=config.group_size,
            temperature=config.temperature,
            top_p=config.top_p,
            top_k=config.top_k,
            min_p=config.min_p,
            max_tokens=config.max_tokens,
            stop=config.stop,
        )
        self.checkpoints = RunCheckpoints(config, self.rows, settings)
        self.batch: Batch | None = None
        self.environment: dict[str, Any] = {}

    def train(self) -> list[dict[str, float]]:
        """Run every step; returns the metrics of each, step 0 (the untrained model) first.

        A run that goes on from a checkpoint has the metrics of the steps after it, and no step 0.
        Ctrl-C and SIGTERM raise KeyboardInterrupt here, after engines and trainer have been shut down.
        """
        with self._crew() as crew:
            self.environment = self._environment(crew)
            self._resume(crew)
            history = [] if self.checkpoints.resumed else [self._report(self._evaluate(0, crew))]
            crew.source.fill()
            for step in range(self.checkpoints.start.step + 1, self.config.num_steps + 1):
                timer = PhaseTimer(self.on_phase)
                metrics = self.train_step(step, crew, timer)
                metrics |= self._sync(crew, metrics["policy_version"], timer)
                untrained = crew.source.state() if self.checkpoints.is_due(step) else None
                crew.source.fill()
                history.append(self._report(metrics | timer.metrics() | self._evaluate(step, crew)))
                if untrained is not None:  # after its metrics are out: a resumed run does not repeat them
                    self._save_checkpoint(step, crew, untrained)
            self._save_weights(crew.trainer)
        return history

    def train_step(self, step: int, crew: Crew, timer: PhaseTimer) -> dict[str, float]:
        """Draws, scores and trains on one batch; its metrics, `policy_version` among them."""
        raise NotImplementedError

    def start_trainer(self, pool: RolloutPool) -> Any:
        """The Ray actor that holds the policy, or leads those that do."""
        if self.config.num_trainer_ranks > 1:
            return start_trainer_group(self.config, pool.handle())
        return start_trainer_actor(self.actor_class, self.config, pool.handle(), self.gpu_shares.trainer)

    def draw(self, crew: Crew, num_groups: int, timer: PhaseTimer) -> tuple[list[Drawn], Rewards]:
        """Groups from the source, with their rewards."""
        with timer("rollout"):
            drawn = crew.source.take(num_groups)
        with timer("reward"):
            rewards = crew.scorer.score([one.row for one in drawn], [one.rollouts for one in drawn])
        return drawn, rewards

    def scores(self, rewards: Rewards, groups: Sequence[Sequence[Rollout]], step: int) -> torch.Tensor:
        """What is learned from [P, G]: total rewards, dealt out anew or less a penalty where the config says so."""
        config, total = self.config, rewards.total
        if config.shuffle_rewards:
            total = shuffle_rewards(total, torch.Generator().manual_seed(config.seed * 1_000_003 + step))
        if config.overlong_buffer_tokens:
            lengths = [len(rollout.token_ids) for group in groups for rollout in group]
            penalty = overlong_penalty(
                lengths, max_tokens=config.max_tokens, buffer_tokens=config.overlong_buffer_tokens
            )
            total = total + penalty.reshape(total.shape)
        return total

    def batch_metrics(self, batch: Batch, policy_version: int, timer: PhaseTimer) -> dict[str, float]:
        """Of what was drawn and what it was worth. policy_version: of the trainer before it learned from the batch."""
        rollouts = [rollout for group in batch.groups for rollout in group]
        return {
            **reward_metrics(batch.rewards),
            **response_metrics(rollouts),
            **staleness_metrics(rollouts, policy_version),
            "perf/rollout_tokens_per_second": sum(len(r.token_ids) for r in rollouts) / timer.seconds["rollout"],
            "perf/engine_num_threads": self.environment["engine"]["num_threads"],
            "perf/trainer_num_threads": self.environment["trainer"]["num_threads"],
        }

    def _sync(self, crew: Crew, policy_version: int, timer: PhaseTimer) -> dict[str, float]:
        """Hands new weights to the engines, if there are any."""
        metrics: dict[str, float] = {}
        if not crew.source.is_settled:
            with timer("rollout"):
                crew.source.settle()
        with timer("weight_sync"):
            if policy_version != crew.pool.policy_version:  # else the optimiser rested
                report = ask(crew.trainer.sync, crew.source.sync_mode)
                metrics = {"weight_sync/bytes": report.bytes, "weight_sync/pause_seconds": max(report.pause_seconds)}
        return metrics

    def _resume(self, crew: Crew) -> None:
        """Trainer, engines and source as they were at the checkpoint to go on from, if there is one."""
        info, start = crew.pool.engine_info, self.checkpoints.start
        self.checkpoints.require({
            "kernel_fingerprint": info.kernel_fingerprint,
            "model_checksum": info.weights_checksum.hex(),  # of the model that the run began with
            "max_model_len": info.max_model_len,
        })  # fmt: skip
        groups = self.checkpoints.load({"policy": lambda *saved: ask(crew.trainer.load_checkpoint, *saved)})
        if start.policy_version != crew.pool.policy_version:
            ask(crew.trainer.sync)
        crew.source.restore(SourceState(position=start.prompt_position, groups=tuple(groups)))

    def _save_checkpoint(self, step: int, crew: Crew, untrained: SourceState) -> None:
        with PhaseTimer(self.on_phase)("checkpoint"):
            self.checkpoints.save(
                step=step,
                prompt_position=untrained.position,
                parts={"policy": lambda directory: ask(crew.trainer.save_checkpoint, directory)},
                groups=untrained.groups,
                num_bytes=ask(crew.trainer.checkpoint_num_bytes),
            )

    def _evaluate(self, step: int, crew: Crew) -> dict[str, float]:
        """The figures of held-out prompts where they are due; step 0 always reports its number."""
        every = self.config.eval_every
        is_due = step in (0, self.config.num_steps) or (every > 0 and step % every == 0)
        metrics: dict[str, float] = {} if step else {"step": 0}
        if not is_due or not self.evaluator.rows:
            return metrics
        timer = PhaseTimer(self.on_phase)
        with timer("eval"):
            metrics |= self.evaluator.evaluate(
                crew.pool, crew.scorer, lambda *arguments: ask(crew.trainer.expected_reward, *arguments)
            )
        return metrics | {"timing_s/eval": timer.seconds["eval"]}

    @contextmanager
    def _crew(self) -> Iterator[Crew]:
        """All of them are ended in the end, however it comes."""
        config = self.config
        with ExitStack() as stack:
            scorer = stack.enter_context(
                RewardScorer(
                    self.reward_functions, num_processes=config.reward_processes, timeout=config.reward_timeout
                )
            )
            pool = stack.enter_context(self._pool())
            self.gpu_shares.require_room(config.num_engines, ray.cluster_resources().get("GPU", 0.0))
            stack.enter_context(_sigterm_as_interrupt())
            trainer = stack.enter_context(_ending(self.start_trainer(pool)))  # beside the engines
            pool.wait_until_ready()
            yield Crew(pool=pool, trainer=trainer, scorer=scorer, source=self._source(pool))

    def _pool(self) -> RolloutPool:
        config = self.config
        is_bounded = config.mode == "async"
        return RolloutPool(
            self.engine_config,
            num_engines=config.num_engines,
            seed=config.seed,
            engine_gpus=self.gpu_shares.engine,
            max_staleness=config.max_staleness if is_bounded else None,
            groups_per_version=config.num_prompts if is_bounded else None,
            on_stale=config.on_stale,
            journal=config.journal_dir,
            keep_weights_every=config.keep_weights_every,
            keep_last=config.keep_last,
            wait_until_ready=False,
        )

    def _source(self, pool: RolloutPool) -> RolloutSource:
        config = self.config
        arguments = (pool, self.rows, config.seed, self.sampling_params, config.num_prompts)
        if config.mode == "sync":
            return SynchronousSource(*arguments)
        if config.mode == "lagged":
            return LaggedSource(*arguments, lag=config.max_staleness)
        return InFlightSource(*arguments, sync_mode=config.sync_mode)

    def _environment(self, crew: Crew) -> dict[str, Any]:
        pool = crew.pool
        return {
            "engine": {
                "num_engines": len(pool.engine_infos),
                "num_threads": pool.engine_info.num_threads,
                "max_model_len": pool.engine_info.max_model_len,
                "kernel_fingerprint": pool.kernel_fingerprint,
            },
            "trainer": ask(crew.trainer.environment),
        }

    def _report(self, metrics: dict[str, float]) -> dict[str, float]:
        for callback in self.callbacks:
            callback(metrics)
        return metrics

    def _save_weights(self, trainer: Any) -> None:
        if self.config.output_dir is not None:
            directory = Path(self.config.output_dir).absolute() / "weights"
            ask(trainer.save_pretrained, str(directory))


def ask(method: Any, *arguments: Any) -> Any:
    """Calls a method of the trainer actor; what it raises is raised here as it was there."""
    try:
        return ray.get(method.remote(*arguments))
    except RayTaskError as error:
        raise error.cause from error


@contextmanager
def _ending(actor: Any) -> Iterator[Any]:
    try:
        yield actor
    finally:
        ray.kill(actor)
        ray.wait([actor.__ray_ready__.remote()], timeout=STOP_SECONDS)  # ends when Ray knows that it is dead


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
        if not isinstance(row["prompt"], str | list | tuple) or not row["prompt"]:
            raise ValueError(
                f"row {i} of the data set has the prompt {row['prompt']!r}: it must be text, ids or chat messages "
                "(rows may differ in that), and not empty"
            )
    return list(rows)
