"""PPO: one step of the training loop, from prompts to a better policy and critic, read from top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rollout import Rollout
from trainers.loop import Batch, Crew, TrainingLoop, ask
from trainers.metrics import PhaseTimer
from trainers.ppo_actor import RemotePPOActor
from trainers.ppo_config import PPOConfig


class PPOTrainer(TrainingLoop):
    """Proximal policy optimisation (arXiv 1707.06347) on exact rollouts; see TrainingLoop for its arguments.

    The driver draws and scores; values, advantages and updates are the trainer actor's (ppo_actor.py), so that no
    tensor of tokens travels. A Batch's advantages are the means over each sample's tokens, before whitening.
    """

    config: PPOConfig
    actor_class = RemotePPOActor

    def train_step(self, step: int, crew: Crew, timer: PhaseTimer) -> dict[str, float]:
        policy_version = crew.pool.policy_version
        drawn, rewards = self.draw(crew, self.config.num_prompts, timer)
        groups = [one.rollouts for one in drawn]
        scores = self.scores(rewards, groups, step) - self._penalties(groups)
        rollouts = [rollout for group in groups for rollout in group]
        with timer("train"):
            actor_metrics, advantages = ask(crew.trainer.step, rollouts, scores.flatten().tolist())
        if actor_metrics["policy_version"] == policy_version:  # no version comes of these groups
            crew.source.discard(len(groups))
        self.batch = Batch(
            rows=[one.row for one in drawn],
            groups=groups,
            rewards=rewards,
            advantages=torch.tensor(advantages).reshape(scores.shape),
        )
        return {
            "step": step,
            **self.batch_metrics(self.batch, policy_version, timer),
            **actor_metrics,
            "perf/train_tokens_per_second": actor_metrics["actor/num_rows"] / timer.seconds["train"],
        }

    def _penalties(self, groups: Sequence[Sequence[Rollout]]) -> torch.Tensor:
        """What each sample pays for having been cut off, [P, G] float32."""
        is_cut_off = [[rollout.finish_reason == "length" for rollout in group] for group in groups]
        return self.config.missing_eos_penalty * torch.tensor(is_cut_off, dtype=torch.float32)
