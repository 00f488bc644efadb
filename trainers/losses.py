"""Losses: the clipped policy loss and the KL estimators, as pure functions of per-token tensors.

C counts the target tokens of a packed batch. Every mean divides by a count over the *whole* batch that the caller
gives, so the losses and metrics of micro-batches add up to those of the batch, however it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

KLEstimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """One micro-batch's share of the batch's loss and metrics; shares of the micro-batches add up."""

    loss: torch.Tensor  # [] float32, carries the gradient
    metrics: dict[str, float]  # by dashboard name


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    num_tokens: int,
    denominator: float | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> LossOutput:
    """-sum(min(r A, clip(r, 1 - clip_low, 1 + clip_high) A)) / denominator with r = exp(logprobs - old_logprobs).

    logprobs, old_logprobs, advantages, loss_mask: [C] float32; only logprobs takes a gradient.
    num_tokens: unmasked tokens of the whole batch, over which the metrics average.
    denominator: num_tokens where None (token-mean, as DAPO, arXiv 2503.14476 eq. 8); Dr. GRPO divides by the number
    of samples times the longest length allowed.
    PPO's surrogate is arXiv 1707.06347 eq. 7; clip_high > clip_low is DAPO's clip-higher.
    """
    if num_tokens < 1:
        raise ValueError(f"num_tokens={num_tokens} must be at least 1: a batch without unmasked tokens has no loss")
    logratio = logprobs - old_logprobs
    ratio = logratio.exp()
    pg_losses = -advantages * ratio
    clipped_losses = -advantages * ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    pg_loss = (torch.maximum(pg_losses, clipped_losses) * loss_mask).sum() / (denominator or num_tokens)
    with torch.no_grad():
        is_clipped = (clipped_losses > pg_losses).float()
        metrics = {
            "actor/pg_loss": pg_loss.item(),
            "actor/pg_clipfrac": (is_clipped * loss_mask).sum().item() / num_tokens,
            "actor/ppo_kl": -(logratio * loss_mask).sum().item() / num_tokens,
            # Sampled from the policy itself, -log pi is an unbiased estimate of the entropy, without full logits.
            "actor/entropy": -(logprobs * loss_mask).sum().item() / num_tokens,
        }
    return LossOutput(loss=pg_loss, metrics=metrics)


def kl_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    num_tokens: int,
    kl_coef: float,
    estimator: KLEstimator = "k3",
) -> LossOutput:
    """kl_coef times the mean estimate of KL(policy || reference); all tensors [C] float32."""
    kl = (kl_estimate(logprobs, reference_logprobs, estimator) * loss_mask).sum() / num_tokens
    return LossOutput(loss=kl_coef * kl, metrics={"actor/kl_loss": kl.item()})


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Per-token estimates of KL(pi || pi_ref) in nats from tokens drawn from pi.

    k1 = log pi - log pi_ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1 (Schulman, "Approximating KL divergence", 2020).
    """
    k1 = logprobs - reference_logprobs
    if estimator == "k1":
        return k1
    if estimator == "k2":
        return k1.square() / 2
    if estimator == "k3":
        return (-k1).exp() + k1 - 1
    raise ValueError(f"estimator={estimator!r} must be 'k1', 'k2' or 'k3'")


def add_losses(first: LossOutput, second: LossOutput) -> LossOutput:
    """The sum of two terms of one loss."""
    return LossOutput(loss=first.loss + second.loss, metrics=first.metrics | second.metrics)
