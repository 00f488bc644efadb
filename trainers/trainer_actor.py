"""Trainer actor: a Ray actor around the Policy, which trains on rollouts and hands its weights to the engines."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import ray
import torch

import kernels
from engine.config import available_cores
from rollout import PoolHandle, Rollout, SyncReport, logs
from rollout.cluster import actor_env
from rollout.sync_report import SyncMode
from trainers.batch import PackedBatch, pack_micro_batches
from trainers.corrections import token_staleness
from trainers.grpo_config import GRPOConfig
from trainers.metrics import mismatch_metrics
from trainers.objective import Targets, batch_loss, make_targets
from trainers.policy import Policy
from trainers.reference import Reference
from trainers.version_history import Compared, VersionHistory


class TrainerActor:
    """Holds the Policy; `start_trainer_actor` puts it into a Ray actor."""

    def __init__(self, model: str, numerics: str, config: GRPOConfig, pool: PoolHandle) -> None:
        """model, numerics: as the engines have them. pool: what RolloutPool.handle() gave, for sync()."""
        self.config, self.pool = config, pool
        self.policy = Policy(
            model,
            numerics=numerics,
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_steps,
            num_threads=config.num_threads,
        )
        self.reference = Reference.from_config(config, self.policy.directory, numerics) if config.kl_coef else None
        self.history = VersionHistory(
            self.policy.directory, numerics, config.max_lag if config.check_stale_tokens else 0
        )
        self.num_skipped_steps = 0

    def step(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], checked: Sequence[Rollout] = ()
    ) -> dict[str, float]:
        """Train on rollouts; `checked` ones only have their log-probabilities compared.

        advantages: one per rollout. The mismatch is that of every token of both that has a loss_mask of 1 (others the
        engine may not have drawn): of the training forward itself, before the optimiser moves, for tokens of the
        current version; for those of an older one, of a forward under its weights. Without a token to train on the
        optimiser rests, and the rest is counted.
        """
        config = self.config
        self._require_lockstep([*rollouts, *checked])
        measured = self.history.compare([*rollouts, *checked], config.micro_batch_tokens, config.share_prompts)
        num_stale_tokens = sum(len(logprobs) for logprobs, _ in measured)
        measured += self._check(checked)
        metrics: dict[str, float] = {}
        batches = pack_micro_batches(rollouts, advantages, config.micro_batch_tokens, config.share_prompts)
        num_tokens = int(sum(batch.loss_mask.sum().item() for batch in batches))
        if num_tokens:
            self.history.keep(self.policy.policy_version, self.policy.model)
            targets, target_metrics = self._targets(batches, rollouts)
            for iteration in range(config.num_iterations):
                is_last = iteration == config.num_iterations - 1
                logprobs, metrics = self._update(batches, targets, num_tokens, len(rollouts), is_last)
                measured += logprobs if iteration == 0 else []
            metrics |= target_metrics
        else:
            self.num_skipped_steps += 1
        return {
            **metrics,
            **mismatch_metrics(*_joined(measured)),
            "mismatch/num_stale_tokens": num_stale_tokens,
            "actor/num_skipped_steps": self.num_skipped_steps,
            "actor/num_tokens": num_tokens,
            "actor/num_rows": sum(batch.num_rows for batch in batches) * config.num_iterations,
            "policy_version": self.policy.policy_version,
        }

    def sync(self, mode: SyncMode = "recompute") -> SyncReport:
        """Hand the weights to every engine of the pool, straight from this actor."""
        return self.pool.sync_weights(self.policy.named_weights(), self.policy.policy_version, mode)

    def expected_reward(self, prompts: Sequence[Any], answers: Sequence[str | Sequence[str]]) -> float:
        """The exact probability of the right answers; see Policy.expected_reward."""
        return self.policy.expected_reward(prompts, answers, max_tokens=self.config.micro_batch_tokens)

    def save_pretrained(self, directory: str) -> None:
        self.policy.save_pretrained(directory)

    def environment(self) -> dict[str, Any]:
        """What fixes this side's bits and speed."""
        return {
            "kernel_fingerprint": self.policy.kernel_fingerprint,
            "num_threads": kernels.get_num_threads(),
            "num_torch_threads": torch.get_num_threads(),
            "torch": torch.__version__,
        }

    @torch.no_grad()
    def _targets(
        self, batches: Sequence[PackedBatch], rollouts: Sequence[Rollout]
    ) -> tuple[list[Targets], dict[str, float]]:
        """What the tokens are held against through every iteration; a forward more where rollouts are stale."""
        is_stale = bool(token_staleness(rollouts, self.policy.policy_version).any())
        is_decoupled = is_stale and self.config.correction != "none"
        return make_targets(
            self.config,
            batches,
            proximal_logprobs=[self.policy.token_logprobs(batch) for batch in batches] if is_decoupled else None,
            reference_logprobs=[self.reference.logprobs(batch) for batch in batches] if self.reference else None,
        )

    def _update(
        self,
        batches: Sequence[PackedBatch],
        targets: Sequence[Targets],
        num_tokens: int,
        num_samples: int,
        is_last: bool,
    ) -> tuple[list[Compared], dict[str, float]]:
        """One optimiser step over the whole batch; (trainer, rollout) log-probabilities of each micro-batch."""
        measured, metrics = [], {}
        counts = {"num_tokens": num_tokens, "num_samples": num_samples}
        for batch, target in zip(batches, targets, strict=True):
            loss_fn = partial(batch_loss, self.config, targets=target, **counts)
            output = self.policy.forward_backward(batch, loss_fn)
            measured.append(self._of_this_version(output.logprobs, batch))
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        metrics |= self.policy.optim_step(is_new_version=is_last)
        if self.reference:
            self.reference.follow(self.policy)
        return measured, metrics

    @torch.no_grad()
    def _check(self, rollouts: Sequence[Rollout]) -> list[Compared]:
        fresh = [rollout for rollout in rollouts if self.policy.policy_version in rollout.policy_versions]
        zeros = [0.0] * len(fresh)
        batches = pack_micro_batches(fresh, zeros, self.config.micro_batch_tokens, self.config.share_prompts)
        return [self._of_this_version(self.policy.token_logprobs(batch), batch) for batch in batches]

    def _of_this_version(self, logprobs: torch.Tensor, batch: PackedBatch) -> Compared:
        is_fresh = batch.policy_versions == self.policy.policy_version
        return logprobs[is_fresh], batch.rollout_logprobs[is_fresh]

    def _require_lockstep(self, rollouts: Sequence[Rollout]) -> None:
        """Refuse rollouts that this policy, on these kernels, cannot have drawn."""
        for rollout in rollouts:
            if rollout.kernel_fingerprint != self.policy.kernel_fingerprint:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn by kernels with fingerprint "
                    f"{rollout.kernel_fingerprint}, the trainer's is {self.policy.kernel_fingerprint}: run engines and "
                    "trainer with one build and one numerics profile"
                )
            version, max_lag = self.policy.policy_version, self.config.max_lag
            others = {one for one in rollout.policy_versions if not version - max_lag <= one <= version}
            if others:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn under policy versions {sorted(others)}, "
                    f"the trainer is at {version} and takes those at most {max_lag} behind it: sync the weights before "
                    'generating, or raise max_staleness in the mode "async"'
                )


def _joined(measured: Sequence[Compared]) -> Compared:
    trainer = [logprobs for logprobs, _ in measured]
    engine = [logprobs for _, logprobs in measured]
    return torch.cat([torch.empty(0), *trainer]), torch.cat([torch.empty(0), *engine])


class RemoteTrainerActor(TrainerActor):
    """A TrainerActor in a process of its own, whose log is the service's."""

    def __init__(self, model: str, numerics: str, config: GRPOConfig, pool: PoolHandle) -> None:
        logs.configure(pool=pool.pool_name, actor="trainer")
        super().__init__(model, numerics, config, pool)


def start_trainer_actor(config: GRPOConfig, pool: PoolHandle) -> Any:
    """A Ray actor that runs a TrainerActor on the pool's model.

    It asks Ray for no CPU: trainer and engines take turns on the same cores, each with its own explicit num_threads.
    """
    environment = actor_env(config.num_threads or available_cores())
    actor_class = ray.remote(num_cpus=0, runtime_env=environment)(RemoteTrainerActor)
    return actor_class.remote(pool.config.model, pool.config.profile_name, config, pool)
