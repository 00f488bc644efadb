"""Experience: what PPO learns from - rewards, values, advantages and returns of tokens, fixed before the first update.

C counts the target tokens of a packed batch.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.batch import PackedBatch
from trainers.gae import explained_variance, packed_gae
from trainers.losses import kl_estimate
from trainers.penalties import token_rewards
from trainers.ppo_config import PPOConfig
from trainers.ranks import ONLY_RANK, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Experience:
    """One micro-batch and what is known of its tokens, under the policy and the critic before their first update."""

    batch: PackedBatch  # its advantages are those of the tokens, not whitened yet
    values: torch.Tensor  # [C] float32, of the states before the tokens
    returns: torch.Tensor  # [C] float32, what the critic learns
    kl: torch.Tensor | None  # [C] float32, where it was taken off the rewards


def make_experience(
    config: PPOConfig, scored: PackedBatch, values: torch.Tensor, reference_logprobs: torch.Tensor | None = None
) -> Experience:
    """Rewards of the tokens, less the KL where it belongs there, and from them advantages and returns.

    scored: its advantages hold each sample's score on each of its tokens. values, reference_logprobs: [C] float32; the
    KL is that of the policy that drew the tokens. The end of a sample is the end of its rewards, also where it was cut
    off (arXiv 2203.02155, section 3.5; GAE: arXiv 1506.02438).
    """
    kl = None
    if reference_logprobs is not None and config.kl_in == "reward":
        kl = kl_estimate(scored.rollout_logprobs, reference_logprobs, config.kl_estimator)
    penalty = torch.zeros_like(values) if kl is None else kl
    rewards = token_rewards(scored.advantages, penalty, scored.sample_index, kl_coef=config.kl_coef)
    advantages, returns = packed_gae(rewards, values, scored.sample_index, gamma=config.gamma, lam=config.gae_lambda)
    return Experience(batch=dataclasses.replace(scored, advantages=advantages), values=values, returns=returns, kl=kl)


def experience_metrics(experiences: Sequence[Experience], ranks: Ranks = ONLY_RANK) -> dict[str, float]:
    """Figures over all tokens of a batch, of all ranks; the advantages are those before they are whitened."""
    advantages = ranks.joined(torch.cat([one.batch.advantages for one in experiences]))
    values = ranks.joined(torch.cat([one.values for one in experiences]))
    returns = ranks.joined(torch.cat([one.returns for one in experiences]))
    metrics = {
        "advantages/mean": advantages.mean().item(),
        "advantages/std": advantages.std(correction=0).item(),
        "critic/values_mean": values.mean().item(),
        "critic/returns_mean": returns.mean().item(),
        "critic/vf_explained_var": explained_variance(values, returns, torch.ones_like(values)),
    }
    kls = [one.kl for one in experiences if one.kl is not None]
    if kls:
        metrics["actor/reward_kl_penalty"] = ranks.joined(torch.cat(kls)).mean().item()
    return metrics
