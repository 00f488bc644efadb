"""Trainer actor: a Ray actor around the Policy, which trains on rollouts and hands its weights to the engines."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import ray
import torch

import kernels
from engine.computation import Device, Numerics
from engine.config import available_cores
from rollout import PoolHandle, Rollout, SyncReport, logs
from rollout.cluster import actor_env
from rollout.sync_report import SyncMode
from trainers.batch import PackedBatch
from trainers.corrections import token_staleness
from trainers.metrics import mismatch_metrics
from trainers.objective import Targets, batch_loss, make_targets
from trainers.objective_config import ObjectiveConfig
from trainers.policy import Policy, safetensors_errors
from trainers.reference import Reference
from trainers.shares import rank_micro_batches, rank_samples
from trainers.version_history import Compared, VersionHistory


class TrainerActor:
    """Holds the Policy; GRPOActor and PPOActor add a `step`, and `start_trainer_actor` puts them into a Ray actor.

    As one of several ranks it is given what all are given, trains on its share, and answers for the whole batch
    (trainer_group.py).
    """

    def __init__(
        self, model: str, numerics: Numerics, config: ObjectiveConfig, pool: PoolHandle, device: Device = "auto"
    ) -> None:
        """model, numerics, device: as the engines have them. pool: what RolloutPool.handle() gave, for sync()."""
        self.config, self.pool = config, pool
        self.policy = Policy(
            model,
            numerics=numerics,
            device=device,
            learning_rate=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_steps,
            learning_rate_schedule=config.learning_rate_schedule,
            num_optimizer_steps=config.num_optimizer_steps,
            num_threads=config.num_threads,
            parallelism=config.trainer_parallelism,
            gradient_checkpointing=config.gradient_checkpointing,
            collective_seconds=config.trainer_timeout,
        )
        self.ranks, directory, ops = self.policy.ranks, self.policy.directory, self.policy.model.ops
        self.reference = Reference.from_config(config, directory, ops) if config.kl_coef else None
        self.history = VersionHistory(directory, ops, config.max_lag if config.check_stale_tokens else 0)
        self.num_skipped_steps = 0

    def sync(self, mode: SyncMode = "recompute") -> SyncReport | None:
        """Hand the weights to every engine of the pool, straight from this actor; rank 0 does, for all ranks."""
        return self.ranks.lead(
            self.policy.named_weights(),
            lambda weights: self.pool.sync_weights(weights, self.policy.policy_version, mode),
        )

    def expected_reward(self, prompts: Sequence[Any], answers: Sequence[str | Sequence[str]]) -> float:
        """The exact probability of the right answers; see Policy.expected_reward."""
        return self.policy.expected_reward(prompts, answers, max_tokens=self.config.micro_batch_tokens)

    def save_pretrained(self, directory: str) -> None:
        self.policy.save_pretrained(directory)

    def checkpoint_num_bytes(self) -> int:
        """About what save_checkpoint writes."""
        return self.policy.checkpoint_num_bytes() + self.history.num_bytes

    def save_checkpoint(self, directory: str) -> dict[str, int]:
        """Write this actor's part of a checkpoint into a directory; returns what load_checkpoint wants back with it.

        Rank 0 writes: whatever is not sharded is the same on every rank.
        Raises OSError where the disk does not take it.
        """
        self.policy.save_checkpoint(directory)
        if self.ranks.rank == 0:
            with safetensors_errors():
                self.history.save(Path(directory))
                if self.reference:
                    self.reference.save(Path(directory))
        return {"policy_version": self.policy.policy_version, "num_skipped_steps": self.num_skipped_steps}

    def load_checkpoint(self, directory: str, facts: Mapping[str, int]) -> None:
        """Go on, to the bit, from what save_checkpoint wrote and returned. Raises ValueError if it is another model's.

        The engines still have the weights that they started with: call sync().
        """
        self.policy.load_checkpoint(directory)
        self.history.load(Path(directory))
        if self.reference:
            self.reference.load(Path(directory))
        self.num_skipped_steps = facts["num_skipped_steps"]
        if self.policy.policy_version != facts["policy_version"]:
            raise ValueError(
                f"{directory} holds an optimiser of policy version {self.policy.policy_version} and a state of version "
                f"{facts['policy_version']}: its files were put together from two checkpoints"
            )

    def environment(self) -> dict[str, Any]:
        """What fixes this side's bits and speed."""
        return {
            "kernel_fingerprint": self.policy.kernel_fingerprint,
            "profile": self.policy.model.profile.name,
            "device": str(self.policy.model.ops.device),
            "num_threads": kernels.get_num_threads(),
            "num_torch_threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "rank": self.ranks.rank,
            "num_ranks": self.ranks.num_ranks,
            "parallelism": self.ranks.parallelism,
        }

    @torch.no_grad()
    def _reference_logprobs(self, batches: Sequence[PackedBatch]) -> list[torch.Tensor] | None:
        """Of each batch [C]; None where no KL is asked for."""
        return [self.reference.logprobs(batch) for batch in batches] if self.reference else None

    @torch.no_grad()
    def _targets(
        self,
        batches: Sequence[PackedBatch],
        rollouts: Sequence[Rollout],
        reference_logprobs: Sequence[torch.Tensor] | None = None,
    ) -> tuple[list[Targets], dict[str, float]]:
        """What the tokens are held against through every update; a forward more where rollouts are stale."""
        is_stale = bool(token_staleness(rollouts, self.policy.policy_version).any())
        is_decoupled = is_stale and self.config.correction != "none"
        return make_targets(
            self.config,
            batches,
            proximal_logprobs=[self.policy.token_logprobs(batch) for batch in batches] if is_decoupled else None,
            reference_logprobs=reference_logprobs,
            ranks=self.ranks,
        )

    def _update(
        self, batches: Sequence[PackedBatch], targets: Sequence[Targets], num_samples: int, is_last: bool
    ) -> tuple[list[torch.Tensor], dict[str, float]]:
        """One optimiser step over micro-batches; the log-probabilities [C] of each and the sums of their metrics.

        num_samples: of all ranks; the sums are over all ranks too.
        """
        logprobs, metrics = [], {}
        counts = {"num_tokens": self._count_tokens(batches), "num_samples": num_samples}
        for batch, target in zip(batches, targets, strict=True):
            output = self.policy.forward_backward(batch, partial(batch_loss, self.config, targets=target, **counts))
            logprobs.append(output.logprobs)
            add_metrics(metrics, output.metrics)
        metrics = self.ranks.add_up(metrics) | self.policy.optim_step(is_new_version=is_last)
        if self.reference:
            self.reference.follow(self.policy)
        return logprobs, metrics

    def _compare_stale(self, rollouts: Sequence[Rollout]) -> list[Compared]:
        """The tokens of older versions, each under its own."""
        own = rank_samples(rollouts, rank=self.ranks.rank, num_ranks=self.ranks.num_ranks)
        return self.history.compare(own, self.config.micro_batch_tokens, self.config.share_prompts)

    @torch.no_grad()
    def _compare_fresh(self, rollouts: Sequence[Rollout]) -> list[Compared]:
        """The tokens of the current version, by a forward of their own."""
        fresh = [rollout for rollout in rollouts if self.policy.policy_version in rollout.policy_versions]
        batches = self._pack(fresh, [0.0] * len(fresh))
        version = self.policy.policy_version
        return [of_version(version, self.policy.token_logprobs(batch), batch) for batch in batches]

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

    def _count_tokens(self, batches: Sequence[PackedBatch]) -> int:
        """Tokens to train on, of all ranks."""
        own = int(sum(batch.loss_mask.sum().item() for batch in batches))
        return self.ranks.add_up({"tokens": own})["tokens"]

    def _count_rows(self, batches: Sequence[PackedBatch]) -> int:
        """Rows with something to train on in their batch, of all ranks."""
        return self.ranks.add_up({"rows": sum(batch.num_rows for batch in batches if batch.num_targets)})["rows"]

    def _compared_metrics(self, measured: Sequence[Compared], num_stale_tokens: int) -> dict[str, float]:
        """The mismatch over all tokens that were compared on any rank. num_stale_tokens: of this rank."""
        by_rank = self.ranks.gather(_joined(measured))
        return {
            **mismatch_metrics(*_joined(by_rank)),
            **self.ranks.add_up({"mismatch/num_stale_tokens": num_stale_tokens}),
        }

    def _require_lockstep(self, rollouts: Sequence[Rollout]) -> None:
        """Refuse rollouts that this policy, on these kernels, cannot have drawn."""
        for rollout in rollouts:
            if rollout.kernel_fingerprint != self.policy.kernel_fingerprint:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn by kernels with fingerprint "
                    f"{rollout.kernel_fingerprint}, the trainer's is {self.policy.kernel_fingerprint}: run engines and "
                    "trainer with one build and one numerics profile"
                )
            if rollout.kept_mass is not None and not self.config.is_truncated:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn from a part of the distribution, which the "
                    "trainer's config does not say: give it the top_p, top_k or min_p of the sampling parameters"
                )
            version, max_lag = self.policy.policy_version, self.config.max_lag
            others = {one for one in rollout.policy_versions if not version - max_lag <= one <= version}
            if others:
                raise ValueError(
                    f"rollout {rollout.group_id}[{rollout.index}] was drawn under policy versions {sorted(others)}, "
                    f"the trainer is at {version} and takes those at most {max_lag} behind it: sync the weights before "
                    'generating, or raise max_staleness in the mode "async"'
                )


def of_version(policy_version: int, logprobs: torch.Tensor, batch: PackedBatch) -> Compared:
    """The trainer's and the engine's log-probabilities of the tokens that were drawn under that version."""
    is_of_version = batch.policy_versions == policy_version
    return logprobs[is_of_version], batch.rollout_logprobs[is_of_version]


def num_compared(measured: Sequence[Compared]) -> int:
    return sum(len(logprobs) for logprobs, _ in measured)


def add_metrics(total: dict[str, float], metrics: Mapping[str, float]) -> None:
    """Adds a micro-batch's share to those before it."""
    for name, value in metrics.items():
        total[name] = total.get(name, 0.0) + value


def _joined(measured: Sequence[Compared]) -> Compared:
    trainer = [logprobs for logprobs, _ in measured]
    engine = [logprobs for _, logprobs in measured]
    return torch.cat([torch.empty(0), *trainer]), torch.cat([torch.empty(0), *engine])


class OwnProcess:
    """Before a trainer actor's class: one in a process of its own, whose log is the service's."""

    def __init__(
        self, model: str, numerics: Numerics, config: ObjectiveConfig, pool: PoolHandle, device: Device
    ) -> None:
        logs.configure(pool=pool.pool_name, actor="trainer")
        super().__init__(model, numerics, config, pool, device)


def start_trainer_actor(
    actor_class: type[OwnProcess], config: ObjectiveConfig, pool: PoolHandle, num_gpus: float = 0.0
) -> Any:
    """A Ray actor of that class on the pool's model. num_gpus: what Ray reserves for it.

    It asks Ray for no CPU: trainer and engines take turns on the same cores, each with its own explicit num_threads.
    Like an engine it is told numerics and device as the pool was, and settles them in its own process.
    """
    environment, engine = actor_env(config.num_threads or available_cores()), pool.config
    remote_class = ray.remote(num_cpus=0, num_gpus=num_gpus, runtime_env=environment)(actor_class)
    return remote_class.remote(engine.model, engine.numerics, config, pool, engine.device)
