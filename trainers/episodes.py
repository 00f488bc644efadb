"""Episodes: rewards and metrics of multi-turn rollouts, read from what EpisodeRunner notes in their metadata."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from rollout import Rollout


def episode_rewards(groups: Sequence[Sequence[Rollout]]) -> torch.Tensor:
    """Each episode's reward, [P, G] float32; NaN, which `group_advantages` skips, where there is none."""
    rewards = [[_reward(rollout) for rollout in group] for group in groups]
    return torch.tensor(rewards, dtype=torch.float32)


def episode_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """episode/...: turns, tokens that the model drew and that environments said, and how episodes ended.

    num_failed counts environments that raised or ran out of time; truncated_ratio is the share of episodes that
    max_turns or max_total_tokens ended.
    """
    num_turns = [rollout.metadata["num_turns"] for rollout in rollouts]
    num_drawn = [sum(end - start for start, end in rollout.metadata["turn_spans"]) for rollout in rollouts]
    endings = [rollout.metadata["ended_by"] for rollout in rollouts]
    num_truncated = endings.count("max_turns") + endings.count("max_total_tokens")
    return {
        "episode/num_turns/mean": sum(num_turns) / len(rollouts),
        "episode/num_turns/max": max(num_turns),
        "episode/num_drawn_tokens/mean": sum(num_drawn) / len(rollouts),
        "episode/num_observed_tokens/mean": (sum(len(r.token_ids) for r in rollouts) - sum(num_drawn)) / len(rollouts),
        "episode/truncated_ratio": num_truncated / len(rollouts),
        "episode/num_failed": endings.count("failure"),
        "episode/num_aborted": endings.count("abort"),
    }


def _reward(rollout: Rollout) -> float:
    if "reward" not in rollout.metadata:
        raise ValueError(
            f"rollout {rollout.group_id}[{rollout.index}] has no 'reward' in its metadata: it was not played by an "
            "EpisodeRunner, so use trainers.RewardScorer"
        )
    reward = rollout.metadata["reward"]
    return math.nan if reward is None else reward
