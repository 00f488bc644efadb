"""GRPO: one step of the training loop, from prompts to better weights, read from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout import Rollout
from trainers.advantages import group_advantages, has_spread
from trainers.grpo_actor import RemoteGRPOActor
from trainers.grpo_config import GRPOConfig
from trainers.loop import Batch, Crew, TrainingLoop, ask
from trainers.metrics import PhaseTimer
from trainers.rewards import Rewards
from trainers.rollout_source import Drawn


class GRPOTrainer(TrainingLoop):
    """Group relative policy optimisation (arXiv 2402.03300) on exact rollouts; see TrainingLoop for its arguments."""

    config: GRPOConfig
    actor_class = RemoteGRPOActor

    def train_step(self, step: int, crew: Crew, timer: PhaseTimer) -> dict[str, float]:
        policy_version = crew.pool.policy_version
        drawn, rewards, num_refills = self._draw_with_spread(crew, timer)
        groups = [one.rollouts for one in drawn]
        total = self.scores(rewards, groups, step)
        advantages = self._advantages(total)
        with timer("train"):
            actor_metrics = ask(crew.trainer.step, *self._select(groups, total, advantages))
        self.batch = Batch(rows=[one.row for one in drawn], groups=groups, rewards=rewards, advantages=advantages)
        return {
            "step": step,
            **self.batch_metrics(self.batch, policy_version, timer),
            **({"reward/num_refills": num_refills} if self.config.max_refills else {}),
            **actor_metrics,
            "perf/train_tokens_per_second": actor_metrics["actor/num_rows"] / timer.seconds["train"],
        }

    def _draw_with_spread(self, crew: Crew, timer: PhaseTimer) -> tuple[list[Drawn], Rewards, int]:
        """A batch, and in place of groups without spread further ones, as often as is allowed; how often it was."""
        drawn, rewards = self.draw(crew, self.config.num_prompts, timer)
        num_refills, num_missing = 0, self._num_idle_groups(rewards)
        crew.source.discard(num_missing)
        while num_missing and num_refills < self.config.max_refills:
            more, more_rewards = self.draw(crew, num_missing, timer)
            drawn, rewards = [*drawn, *more], rewards.joined(more_rewards)
            num_refills, num_missing = num_refills + 1, self._num_idle_groups(more_rewards)
            crew.source.discard(num_missing)
        return drawn, rewards, num_refills

    def _num_idle_groups(self, rewards: Rewards) -> int:
        """Groups that nothing is learned from."""
        return int((~has_spread(rewards.total)).sum()) if self.config.skip_zero_std_groups else 0

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
