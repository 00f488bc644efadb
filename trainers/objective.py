"""Objective: what an ObjectiveConfig says the loss of a batch is, from what its tokens are held against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from trainers.advantages import whiten
from trainers.batch import PackedBatch
from trainers.corrections import correction_weights, effective_sample_size, truncation_weights
from trainers.gae import discounted_returns
from trainers.losses import LossOutput, add_losses, entropy_loss, kl_estimate, kl_loss, policy_loss, token_weights
from trainers.objective_config import ObjectiveConfig
from trainers.penalties import token_rewards
from trainers.ranks import ONLY_RANK, Ranks


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What the tokens of one micro-batch are held against, fixed before the first update on its batch."""

    advantages: torch.Tensor  # [C] float32
    old_logprobs: torch.Tensor  # [C] float32, of the proximal policy: the ratio's denominator
    reference_logprobs: torch.Tensor | None  # [C] float32, where the loss holds a KL
    correction: torch.Tensor | None  # [C] float32 for tokens drawn otherwise than by the proximal policy, else None


def make_targets(
    config: ObjectiveConfig,
    batches: Sequence[PackedBatch],
    *,
    proximal_logprobs: Sequence[torch.Tensor] | None = None,
    reference_logprobs: Sequence[torch.Tensor] | None = None,
    ranks: Ranks = ONLY_RANK,
) -> tuple[list[Targets], dict[str, float]]:
    """The targets of each micro-batch of one batch, and the batch's metrics about them.

    proximal_logprobs: [C] for each micro-batch, of the policy before its first update; None on policy, where the
    rollouts' own are those, bit for bit. reference_logprobs: [C] for each, where config.kl_coef is above 0.
    ranks: those that share the batch, over all of which figures are taken; all call this.
    """
    old_logprobs = proximal_logprobs or [batch.rollout_logprobs for batch in batches]
    corrections, metrics = _corrections(config, batches, proximal_logprobs, ranks)
    advantages = [batch.advantages for batch in batches]
    if config.kl_in == "reward" and reference_logprobs is not None:
        advantages, penalty = _with_kl_penalty(config, batches, reference_logprobs, ranks)
        metrics["actor/reward_kl_penalty"] = penalty
        reference_logprobs = None
    if config.whiten_advantages and batches:
        masks = torch.cat([batch.loss_mask for batch in batches])
        whitened = ranks.over_all(whiten, torch.cat(advantages), masks)
        advantages = whitened.split([batch.num_targets for batch in batches])
    references = reference_logprobs or [None] * len(batches)
    columns = zip(advantages, old_logprobs, references, corrections, strict=True)
    return [
        Targets(advantages=a, old_logprobs=old, reference_logprobs=reference, correction=correction)
        for a, old, reference, correction in columns
    ], metrics


def batch_loss(
    config: ObjectiveConfig,
    logprobs: torch.Tensor,
    batch: PackedBatch,
    targets: Targets,
    *,
    num_tokens: int,
    num_samples: int,
) -> LossOutput:
    """One micro-batch's share of the loss: the policy term, and KL and entropy where the config weighs them.

    logprobs: [C] float32, of the current policy, with gradient. num_tokens, num_samples: of the whole batch.
    """
    weights = token_weights(
        batch.loss_mask,
        config.loss_aggregation,
        num_tokens=num_tokens,
        num_samples=num_samples,
        sample_index=batch.sample_index,
        max_tokens=config.max_tokens,
    )
    loss = policy_loss(
        logprobs,
        targets.old_logprobs,
        targets.advantages,
        batch.loss_mask,
        num_tokens=num_tokens,
        weights=weights,
        correction=targets.correction,
        objective=config.objective,
        ratio_level=config.ratio_level,
        sample_index=batch.sample_index,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        dual_clip=config.dual_clip,
    )
    if targets.reference_logprobs is not None:
        kl = kl_loss(
            logprobs,
            targets.reference_logprobs,
            batch.loss_mask,
            num_tokens=num_tokens,
            kl_coef=config.kl_coef,
            weights=weights,
            estimator=config.kl_estimator,
        )
        loss = add_losses(loss, kl)
    if config.entropy_coef:
        bonus = entropy_loss(logprobs, targets.old_logprobs, weights=weights, entropy_coef=config.entropy_coef)
        loss = add_losses(loss, LossOutput(loss=bonus, metrics={}))
    return loss


def _corrections(
    config: ObjectiveConfig,
    batches: Sequence[PackedBatch],
    proximal_logprobs: Sequence[torch.Tensor] | None,
    ranks: Ranks,
) -> tuple[Sequence[torch.Tensor | None], dict[str, float]]:
    """Weights for what an older policy drew, times those for what a part of the distribution was drawn from."""
    if config.correction == "none" or not batches:
        return [None] * len(batches), {}
    weights: list[torch.Tensor] | None = None
    metrics: dict[str, float] = {}
    if config.is_truncated:
        weights = [truncation_weights(batch.kept_mass) for batch in batches]
        metrics["correction/kept_mass_mean"] = _mean_and_size(weights, batches, ranks)[0]
    if proximal_logprobs is not None:
        stale = _stale_weights(config, batches, proximal_logprobs)
        weights = stale if weights is None else [one * other for one, other in zip(weights, stale, strict=True)]
        mean, size = _mean_and_size(weights, batches, ranks)
        metrics |= {"correction/weight_mean": mean, "correction/effective_sample_size": size}
    return weights or [None] * len(batches), metrics


def _stale_weights(
    config: ObjectiveConfig, batches: Sequence[PackedBatch], proximal_logprobs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    return [
        correction_weights(
            proximal,
            batch.rollout_logprobs,
            batch.loss_mask,
            batch.sample_index,
            correction=config.correction,
            low=config.correction_low,
            high=config.correction_high,
        )
        for proximal, batch in zip(proximal_logprobs, batches, strict=True)
    ]


def _mean_and_size(
    weights: Sequence[torch.Tensor], batches: Sequence[PackedBatch], ranks: Ranks
) -> tuple[float, float]:
    """Mean weight and effective sample size over the tokens of all ranks."""
    joined, mask = ranks.joined(torch.cat(weights)), ranks.joined(torch.cat([batch.loss_mask for batch in batches]))
    return ((joined * mask).sum() / mask.sum()).item(), effective_sample_size(joined, mask)


def _with_kl_penalty(
    config: ObjectiveConfig, batches: Sequence[PackedBatch], reference_logprobs: Sequence[torch.Tensor], ranks: Ranks
) -> tuple[list[torch.Tensor], float]:
    """Advantages less the KL that each token and those after it cost, and the mean KL of a token.

    The KL is that of the policy that drew the tokens (arXiv 2501.03262 eq. 8-9). A baseline of the group is already in
    the advantages; what a token cost before it was drawn is no part of its credit, so the KL needs none.
    """
    advantages, sums = [], {"kl": 0.0, "tokens": 0.0}
    for batch, reference in zip(batches, reference_logprobs, strict=True):
        kl = kl_estimate(batch.rollout_logprobs, reference, config.kl_estimator)
        rewards = token_rewards(batch.advantages, kl, batch.sample_index, kl_coef=config.kl_coef)
        advantages.append(discounted_returns(rewards, batch.sample_index))
        sums["kl"] += (kl * batch.loss_mask).sum().item()
        sums["tokens"] += batch.loss_mask.sum().item()
    sums = ranks.add_up(sums)
    return advantages, sums["kl"] / max(1.0, sums["tokens"])
