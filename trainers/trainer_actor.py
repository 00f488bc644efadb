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
from trainers.batch import PackedBatch
from trainers.grpo_config import GRPOConfig
from trainers.losses import LossOutput, add_losses, kl_loss, policy_loss
from trainers.metrics import mismatch_metrics
from trainers.policy import Policy, load_transformer, packed_logprobs
from trainers.shares import rank_micro_batches
from trainers.trainer_group import start_trainer_group


class TrainerActor:
    """Holds the Policy; `start_trainer_actor` puts it into a Ray actor.

    As one of several ranks it is given what all are given, and trains on its share (trainer_group.py).
    """

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
            parallelism=config.trainer_parallelism,
            gradient_checkpointing=config.gradient_checkpointing,
            collective_seconds=config.trainer_timeout,
        )
        self.ranks = self.policy.ranks
        self.reference = (
            load_transformer(self.policy.directory, numerics, with_masters=False) if config.kl_coef else None
        )
        self.num_skipped_steps = 0

    def step(
        self, rollouts: Sequence[Rollout], advantages: Sequence[float], checked: Sequence[Rollout] = ()
    ) -> dict[str, float]:
        """Train on rollouts of the current version; `checked` ones only have their log-probabilities compared.

        advantages: one per rollout. The mismatch is that of every token of both that has a loss_mask of 1 (others the
        engine may not have drawn): of the training forward itself, before the optimiser moves. Without a token to
        train on the optimiser rests, and the rest is counted.
        """
        self._require_lockstep([*rollouts, *checked])
        measured = self._check(checked)
        metrics: dict[str, float] = {}
        batches = self._pack(rollouts, advantages)
        num_tokens = sum(sum(rollout.loss_mask) for rollout in rollouts)
        if num_tokens:
            for iteration in range(self.config.num_iterations):
                logprobs, metrics = self._update(batches, num_tokens, len(rollouts))
                measured += logprobs if iteration == 0 else []
        else:
            self.num_skipped_steps += 1
        return {
            **metrics,
            **mismatch_metrics(*_joined(self.ranks.gather(_joined(measured)))),
            **self.ranks.add_up({"actor/num_rows": self._num_rows(batches)}),
            "actor/num_skipped_steps": self.num_skipped_steps,
            "actor/num_tokens": num_tokens,
            "policy_version": self.policy.policy_version,
        }

    def sync(self) -> SyncReport | None:
        """Hand the weights to every engine of the pool, straight from this actor; rank 0 does, for all ranks."""
        return self.ranks.lead(
            self.policy.named_weights(), lambda weights: self.pool.sync_weights(weights, self.policy.policy_version)
        )

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
            "rank": self.ranks.rank,
            "num_ranks": self.ranks.num_ranks,
            "parallelism": self.ranks.parallelism,
        }

    def _update(
        self, batches: Sequence[PackedBatch], num_tokens: int, num_samples: int
    ) -> tuple[list[tuple[torch.Tensor, torch.Tensor]], dict[str, float]]:
        """One optimiser step over the whole batch; (trainer, rollout) log-probabilities of each micro-batch."""
        measured, metrics = [], {}
        for batch in batches:
            loss_fn = partial(
                self._loss,
                reference_logprobs=self._reference_logprobs(batch),
                num_tokens=num_tokens,
                num_samples=num_samples,
            )
            output = self.policy.forward_backward(batch, loss_fn)
            measured.append((output.logprobs, batch.rollout_logprobs))
            for name, value in output.metrics.items():
                metrics[name] = metrics.get(name, 0.0) + value
        return measured, self.ranks.add_up(metrics) | self.policy.optim_step()

    def _loss(
        self,
        logprobs: torch.Tensor,
        batch: PackedBatch,
        *,
        reference_logprobs: torch.Tensor | None,
        num_tokens: int,
        num_samples: int,
    ) -> LossOutput:
        config = self.config
        loss = policy_loss(
            logprobs,
            batch.rollout_logprobs,  # exactly this policy's own before the first update, so the ratio starts at 1
            batch.advantages,
            batch.loss_mask,
            num_tokens=num_tokens,
            denominator=num_tokens if config.loss_aggregation == "token-mean" else num_samples * config.max_tokens,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        if reference_logprobs is None:
            return loss
        kl = kl_loss(
            logprobs,
            reference_logprobs,
            batch.loss_mask,
            num_tokens=num_tokens,
            kl_coef=config.kl_coef,
            estimator=config.kl_estimator,
        )
        return add_losses(loss, kl)

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> torch.Tensor | None:
        return None if self.reference is None else packed_logprobs(self.reference, batch)

    @torch.no_grad()
    def _check(self, rollouts: Sequence[Rollout]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        zeros = [0.0] * len(rollouts)
        return [(self.policy.token_logprobs(b), b.rollout_logprobs) for b in self._pack(rollouts, zeros)]

    def _pack(self, rollouts: Sequence[Rollout], advantages: Sequence[float]) -> list[PackedBatch]:
        """This rank's micro-batches."""
        return rank_micro_batches(
            rollouts,
            advantages,
            rank=self.ranks.rank,
            num_ranks=self.ranks.num_ranks,
            max_tokens=self.config.micro_batch_tokens,
            share_prompts=self.config.share_prompts,
        )

    def _num_rows(self, batches: Sequence[PackedBatch]) -> int:
        return sum(batch.num_rows for batch in batches if batch.num_targets) * self.config.num_iterations

    def _require_lockstep(self, rollouts: Sequence[Rollout]) -> None:
        """Refuse rollouts that this policy, on these kernels, cannot have drawn."""
        for rollout in rollouts:
            if rollout.kernel_fingerprint != self.policy.kernel_fingerprint:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn by kernels with fingerprint "
                    f"{rollout.kernel_fingerprint}, the trainer's is {self.policy.kernel_fingerprint}: run engines and "
                    "trainer with one build and one numerics profile"
                )
            stale = set(rollout.policy_versions) - {self.policy.policy_version}
            if stale:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn under policy versions {sorted(stale)}, "
                    f"the trainer is at {self.policy.policy_version}: sync the weights before generating"
                )


def _joined(measured: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    trainer = [logprobs for logprobs, _ in measured]
    engine = [logprobs for _, logprobs in measured]
    return torch.cat([torch.empty(0), *trainer]), torch.cat([torch.empty(0), *engine])


class RemoteTrainerActor(TrainerActor):
    """A TrainerActor in a process of its own, whose log is the service's."""

    def __init__(self, model: str, numerics: str, config: GRPOConfig, pool: PoolHandle) -> None:
        logs.configure(pool=pool.pool_name, actor="trainer")
        super().__init__(model, numerics, config, pool)


def start_trainer_actor(config: GRPOConfig, pool: PoolHandle) -> Any:
    """A Ray actor that runs a TrainerActor on the pool's model, or a group of them where there are several ranks.

    It asks Ray for no CPU: trainer and engines take turns on the same cores, each with its own explicit num_threads.
    """
    if config.num_trainer_ranks > 1:
        return start_trainer_group(config, pool)
    environment = actor_env(config.num_threads or available_cores())
    actor_class = ray.remote(num_cpus=0, runtime_env=environment)(RemoteTrainerActor)
    return actor_class.remote(pool.config.model, pool.config.profile_name, config, pool)
