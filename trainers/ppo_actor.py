"""PPO's trainer actor: holds policy and critic, and learns from a batch of samples and their scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from engine.computation import Device, Numerics
from rollout import PoolHandle, Rollout
from trainers.batch import PackedBatch
from trainers.critic import Critic
from trainers.experience import Experience, experience_metrics, make_experience
from trainers.minibatches import split_groups, visiting_order
from trainers.objective import Targets
from trainers.packed import sample_means
from trainers.ppo_config import PPOConfig
from trainers.shares import split_by_rows
from trainers.trainer_actor import (
    OwnProcess,
    TrainerActor,
    add_metrics,
    num_compared,
    of_version,
)
from trainers.version_history import Compared


@dataclass(frozen=True, slots=True, kw_only=True)
class Minibatch:
    """What one update of policy and critic learns from, as micro-batches."""

    samples: list[int]  # places in the step's rollouts, of all ranks
    own_samples: list[int]  # those of this rank, which the experiences' sample_index counts
    experiences: list[Experience]
    targets: list[Targets]  # of the policy's loss on each

    @property
    def batches(self) -> list[PackedBatch]:
        return [one.batch for one in self.experiences]


class PPOActor(TrainerActor):
    """A TrainerActor with a critic (arXiv 1707.06347); as one of several ranks it trains both on its share."""

    config: PPOConfig

    def __init__(
        self, model: str, numerics: Numerics, config: PPOConfig, pool: PoolHandle, device: Device = "auto"
    ) -> None:
        """See TrainerActor."""
        super().__init__(model, numerics, config, pool, device)
        self.critic = Critic(
            self.policy.directory,
            numerics=numerics,
            device=device,
            learning_rate=config.critic_learning_rate,
            head_learning_rate=config.critic_head_learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            max_grad_norm=config.max_grad_norm,
            warmup_steps=config.warmup_steps,
            learning_rate_schedule=config.learning_rate_schedule,
            num_optimizer_steps=config.num_optimizer_steps,
            gradient_checkpointing=config.gradient_checkpointing,
            ranks=self.ranks,
        )
        self.num_steps = 0  # that the critic has learned from

    def step(self, rollouts: Sequence[Rollout], scores: Sequence[float]) -> tuple[dict[str, float], list[float]]:
        """Train on rollouts; the step's metrics and each sample's mean advantage.

        scores: one per rollout; a sample whose score is NaN is only compared. The mismatch is that of every token with
        a loss_mask of 1: for those of the current version of a forward before the optimiser moves, for those of an
        older one under its weights. `actor/...` and `critic/...` are means over the step's updates; values, returns
        and the explained variance are those before the first. Without a token to train on, or while the critic warms
        up, the policy rests and the version stays.
        """
        self._require_lockstep(rollouts)
        minibatches, metrics = self._minibatches(rollouts, scores)
        order = visiting_order(len(minibatches), self.config.num_epochs, self._shuffling_seed())
        visits = [minibatches[part] for part in order]
        compared = self._compare_stale(rollouts)
        num_stale_tokens = num_compared(compared)
        if visits and self.num_steps >= self.config.critic_warmup_steps:
            compared += self._compare_rest(rollouts, visits[0].samples)
            fresh, policy_metrics = self._train_policy(visits)
            compared, metrics = compared + fresh, metrics | policy_metrics
        else:
            compared += self._compare_rest(rollouts, [])
        metrics = self._train_critic(visits) | metrics  # values and returns stay those before the updates
        self.num_steps += bool(visits)
        self.num_skipped_steps += not visits
        return {
            **metrics,
            **self._compared_metrics(compared, num_stale_tokens),
            "actor/num_skipped_steps": self.num_skipped_steps,
            "actor/num_tokens": sum(self._count_tokens(minibatch.batches) for minibatch in minibatches),
            "actor/num_rows": sum(self._count_rows(visit.batches) for visit in visits),
            "policy_version": self.policy.policy_version,
        }, self._mean_advantages(minibatches, len(rollouts))

    def checkpoint_num_bytes(self) -> int:
        return super().checkpoint_num_bytes() + self.critic.checkpoint_num_bytes()

    def save_checkpoint(self, directory: str) -> dict[str, int]:
        facts = super().save_checkpoint(directory)
        self.critic.save_checkpoint(Path(directory))
        return facts | {"num_steps": self.num_steps}

    def load_checkpoint(self, directory: str, facts: Mapping[str, int]) -> None:
        super().load_checkpoint(directory, facts)
        self.critic.load_checkpoint(Path(directory))
        self.num_steps = facts["num_steps"]

    @torch.no_grad()
    def _minibatches(
        self, rollouts: Sequence[Rollout], scores: Sequence[float]
    ) -> tuple[list[Minibatch], dict[str, float]]:
        """The samples that have a score, with values, advantages and returns, whitened over all of them."""
        trained = [i for i, one in enumerate(rollouts) if not math.isnan(scores[i]) and any(one.loss_mask)]
        if not trained:
            return [], {}
        parts = split_groups(rollouts, trained, self.config.num_minibatches)
        scored = [self._pack([rollouts[i] for i in part], [scores[i] for i in part]) for part in parts]
        batches = [batch for part in scored for batch in part]
        references = self._reference_logprobs(batches)
        experiences = [
            make_experience(self.config, batch, self.critic.values(batch), reference)
            for batch, reference in zip(batches, references or [None] * len(batches), strict=True)
        ]
        targets, metrics = self._targets(
            [one.batch for one in experiences], rollouts, references if self.config.kl_in == "loss" else None
        )
        ready, held = iter(experiences), iter(targets)
        minibatches = [
            Minibatch(
                samples=part,
                own_samples=self._own(rollouts, part),
                experiences=list(islice(ready, len(packed))),
                targets=list(islice(held, len(packed))),
            )
            for part, packed in zip(parts, scored, strict=True)
        ]
        return minibatches, metrics | experience_metrics(experiences, self.ranks)

    def _train_policy(self, visits: Sequence[Minibatch]) -> tuple[list[Compared], dict[str, float]]:
        """An update for each visit; what the first one compared, and the means of their metrics."""
        version, updates = self.policy.policy_version, []
        self.history.keep(version, self.policy.named_weights())
        for visit in visits:
            is_last = len(updates) == len(visits) - 1
            logprobs, metrics = self._update(visit.batches, visit.targets, len(visit.samples), is_last)
            if not updates:
                compared = list(map(partial(of_version, version), logprobs, visit.batches))
                of_ranks = self.ranks.gather(_ratio_abs_diff_max(logprobs, visit.targets))
                first_ratio = {"actor/first_ratio_abs_diff_max": max(of_ranks)}
            updates.append(metrics)
        return compared, _means(updates) | first_ratio

    def _train_critic(self, visits: Sequence[Minibatch]) -> dict[str, float]:
        """An update for each visit; the means of their metrics."""
        updates = []
        for visit in visits:
            metrics: dict[str, float] = {}
            num_tokens = self._count_tokens(visit.batches)
            for one in visit.experiences:
                loss = self.critic.forward_backward(
                    one.batch, one.values, one.returns, num_tokens=num_tokens, clip=self.config.value_clip
                )
                add_metrics(metrics, loss.metrics)
            updates.append(self.ranks.add_up(metrics) | self.critic.optim_step())
        return _means(updates)

    def _compare_rest(self, rollouts: Sequence[Rollout], samples: Sequence[int]) -> list[Compared]:
        """All but the samples that a training forward compares, by a forward of their own."""
        if not self.config.check_all_groups:
            return []
        return self._compare_fresh([one for i, one in enumerate(rollouts) if i not in set(samples)])

    def _own(self, rollouts: Sequence[Rollout], samples: Sequence[int]) -> list[int]:
        """Those of the samples (places in rollouts) that are this rank's, in order."""
        parts = split_by_rows([rollouts[i] for i in samples], self.ranks.num_ranks)
        return [samples[i] for i in parts[self.ranks.rank]]

    def _mean_advantages(self, minibatches: Sequence[Minibatch], num_samples: int) -> list[float]:
        """Of each sample the mean over its tokens, before whitening; 0 where it was not trained on."""
        means = [0.0] * num_samples
        for of_rank in self.ranks.gather(_own_mean_advantages(minibatches)):
            for place, mean in of_rank.items():
                means[place] = mean
        return means

    def _shuffling_seed(self) -> int:
        return self.config.seed * 1_000_003 + self.num_steps


def _ratio_abs_diff_max(logprobs: Sequence[torch.Tensor], targets: Sequence[Targets]) -> float:
    """How far the ratio of any token is from 1; exactly 0.0 before the first update."""
    differences = [(new - target.old_logprobs).exp() - 1.0 for new, target in zip(logprobs, targets, strict=True)]
    return torch.cat([torch.zeros(1), *differences]).abs().max().item()


def _means(updates: Sequence[dict[str, float]]) -> dict[str, float]:
    names = updates[0] if updates else ()
    return {name: sum(metrics[name] for metrics in updates) / len(updates) for name in names}


def _own_mean_advantages(minibatches: Sequence[Minibatch]) -> dict[int, float]:
    """Of this rank's samples, by their place in the step's rollouts."""
    means: dict[int, float] = {}
    for minibatch in minibatches:
        for batch in minibatch.batches:
            of_tokens = sample_means(batch.advantages, batch.loss_mask, batch.sample_index)
            for index, mean in zip(batch.sample_index.tolist(), of_tokens.tolist(), strict=True):
                means[minibatch.own_samples[index]] = mean
    return means


class RemotePPOActor(OwnProcess, PPOActor):
    """What a Ray actor runs."""
