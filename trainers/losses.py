"""Losses: policy objectives, KL, entropy and value terms, as pure functions of per-token tensors.

C counts the target tokens of a packed batch; padded tensors [B, T] go as well where nothing is summed by sample. Every
loss is sum(per-token term * weight) with the weights of `token_weights`, which divide by counts of the *whole* batch,
so the losses and metrics of micro-batches add up to those of the batch, however it was cut.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from trainers.choices import Aggregation, KLEstimator, Objective, RatioLevel, require_choice
from trainers.packed import sample_means, sample_sums


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOutput:
    """One micro-batch's share of the batch's loss and metrics; shares of the micro-batches add up."""

    loss: torch.Tensor  # [] float32, carries the gradient
    metrics: dict[str, float]  # by dashboard name


def token_weights(
    loss_mask: torch.Tensor,
    aggregation: Aggregation = "token-mean",
    *,
    num_tokens: int,
    num_samples: int | None = None,
    sample_index: torch.Tensor | None = None,
    max_tokens: int | None = None,
) -> torch.Tensor:
    """The weight [C] of each token's term in the batch's loss; 0 where masked.

    loss_mask: [C] float32. sample_index: [C], for "seq-mean-token-mean"; a sample may not be cut in two.
    num_tokens, num_samples: unmasked tokens and samples of the whole batch, all micro-batches together.

    "token-mean": every token alike (DAPO, arXiv 2503.14476 eq. 8). "seq-mean-token-sum": tokens of a sample add up,
    samples are averaged. "seq-mean-token-mean": each sample counts alike, however long (GRPO, arXiv 2402.03300 eq. 3).
    "seq-mean-token-sum-norm": as the second, over max_tokens, the longest length allowed (Dr. GRPO, arXiv 2503.20783).
    """
    require_choice("aggregation", aggregation, Aggregation)
    _require_count("num_tokens", num_tokens)
    if aggregation == "token-mean":
        return loss_mask / num_tokens
    num_samples = _require_count("num_samples", num_samples)
    if aggregation == "seq-mean-token-sum":
        return loss_mask / num_samples
    if aggregation == "seq-mean-token-sum-norm":
        return loss_mask / (num_samples * _require_count("max_tokens", max_tokens))
    counts = sample_sums(loss_mask, _require_samples(sample_index, f"aggregation={aggregation!r}"))
    return loss_mask / (counts.clamp(min=1.0) * num_samples)


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    num_tokens: int,
    weights: torch.Tensor | None = None,
    correction: torch.Tensor | None = None,
    objective: Objective = "clip",
    ratio_level: RatioLevel = "token",
    sample_index: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
) -> LossOutput:
    """The policy gradient term, sum(loss per token * correction * weights), with r the ratio of `policy_ratio`.

    logprobs, old_logprobs, advantages, loss_mask: [C] float32; only logprobs takes a gradient.
    num_tokens: unmasked tokens of the whole batch, over which the metrics average.
    weights: [C] of `token_weights`; the token mean where None. correction: [C] of corrections.py; 1 where None.
    sample_index: [C], for ratios of sequences.

    "clip": -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A), PPO's surrogate (arXiv 1707.06347 eq. 7); clip_high >
    clip_low is DAPO's clip-higher (arXiv 2503.14476). Where A < 0, dual_clip=c bounds it by -c A (arXiv 1912.09729;
    the usual c is 3). "cispo": -sg(clip(r)) A log pi, so that no token loses its gradient (arXiv 2506.13585;
    clip_low=1 leaves r unbounded below). "reinforce": -A log pi, without a ratio.
    """
    require_choice("objective", objective, Objective)
    if dual_clip is not None:
        _require_dual_clip(dual_clip, objective, clip_high)
    weights = token_weights(loss_mask, num_tokens=num_tokens) if weights is None else weights
    ratio = policy_ratio(logprobs, old_logprobs, loss_mask, ratio_level, sample_index)
    bounded = ratio.clamp(1.0 - clip_low, 1.0 + clip_high)
    if objective == "clip":
        losses, clips = _clipped_surrogate(ratio, bounded, advantages, dual_clip)
    elif objective == "cispo":
        losses, clips = -bounded.detach() * advantages * logprobs, {"actor/pg_clipfrac": bounded != ratio}
    else:
        losses, clips = -advantages * logprobs, {"actor/pg_clipfrac": torch.zeros_like(loss_mask)}
    pg_loss = ((losses if correction is None else losses * correction) * weights).sum()
    with torch.no_grad():
        token_means = {
            **clips,
            "actor/ppo_kl": old_logprobs - logprobs,
            # Sampled from the policy itself, -log pi is an unbiased estimate of the entropy, without full logits.
            "actor/entropy": -logprobs,
        }
        metrics = {name: (values * loss_mask).sum().item() / num_tokens for name, values in token_means.items()}
    return LossOutput(loss=pg_loss, metrics={"actor/pg_loss": pg_loss.item(), **metrics})


def policy_ratio(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    level: RatioLevel = "token",
    sample_index: torch.Tensor | None = None,
) -> torch.Tensor:
    """pi / pi_old on each token, [C], differentiable; exactly 1 where both log-probabilities are the same bits.

    "token": the token's own. "sequence": the geometric mean over the sample (GSPO, arXiv 2507.18071 eq. 7), on each
    of its tokens. "sequence-product": the sample's whole likelihood ratio (RLOO, arXiv 2402.14740, takes a completion
    for one action).
    """
    require_choice("ratio_level", level, RatioLevel)
    logratio = logprobs - old_logprobs
    if level == "token":
        return logratio.exp()
    samples = _require_samples(sample_index, f"ratio_level={level!r}")
    if level == "sequence":
        return sample_means(logratio, loss_mask, samples).exp()
    return sample_sums(logratio * loss_mask, samples).exp()


def kl_loss(
    logprobs: torch.Tensor,
    reference_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    num_tokens: int,
    kl_coef: float,
    weights: torch.Tensor | None = None,
    estimator: KLEstimator = "k3",
) -> LossOutput:
    """kl_coef times the weighted estimates of KL(policy || reference); all tensors [C] float32.

    weights: as in policy_loss, the token mean where None; the metric is the token mean always.
    """
    weights = token_weights(loss_mask, num_tokens=num_tokens) if weights is None else weights
    kl = kl_estimate(logprobs, reference_logprobs, estimator)
    token_mean = (kl.detach() * loss_mask).sum().item() / num_tokens
    return LossOutput(loss=kl_coef * (kl * weights).sum(), metrics={"actor/kl_loss": token_mean})


def kl_estimate(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, estimator: KLEstimator) -> torch.Tensor:
    """Per-token estimates of KL(pi || pi_ref) in nats from tokens drawn from pi.

    k1 = log pi - log pi_ref; k2 = k1^2 / 2; k3 = exp(-k1) + k1 - 1 (Schulman, "Approximating KL divergence", 2020).
    """
    require_choice("estimator", estimator, KLEstimator)
    k1 = logprobs - reference_logprobs
    if estimator == "k1":
        return k1
    return k1.square() / 2 if estimator == "k2" else (-k1).exp() + k1 - 1


def entropy_loss(
    logprobs: torch.Tensor, old_logprobs: torch.Tensor, *, weights: torch.Tensor, entropy_coef: float
) -> torch.Tensor:
    """A bonus for entropy, from the sampled tokens alone: [], to be added to the loss.

    Its gradient is an unbiased estimate of entropy_coef times that of minus the policy's weighted mean entropy, since
    grad H = -E[log pi grad log pi]; tokens of pi_old are reweighted by r. Full logits would lower the variance, not
    change the mean. The value itself means nothing: `actor/entropy` is the estimate to look at.
    """
    ratio = (logprobs - old_logprobs).exp()
    return entropy_coef * (ratio * logprobs.detach() * weights).sum()


def value_loss(
    values: torch.Tensor,
    old_values: torch.Tensor,
    returns: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    num_tokens: int,
    weights: torch.Tensor | None = None,
    clip: float | None = 0.2,
) -> LossOutput:
    """The critic's loss, sum(max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) / 2 * weights).

    values: [C] float32 with gradient; old_values: those that the advantages were made with; returns: their targets.
    clip=None is the plain squared error. The clip is that of PPO's first implementation (openai/baselines, ppo2), which
    TRL, verl and OpenRLHF kept.
    """
    if clip is not None and clip <= 0:
        raise ValueError(f"clip={clip} must be above 0; None does not clip values")
    weights = token_weights(loss_mask, num_tokens=num_tokens) if weights is None else weights
    unclipped = (values - returns).square()
    clipped = unclipped
    if clip is not None:
        clipped = (old_values + (values - old_values).clamp(-clip, clip) - returns).square()
    loss = 0.5 * (torch.maximum(unclipped, clipped) * weights).sum()
    with torch.no_grad():
        metrics = {
            "critic/vf_loss": loss.item(),
            "critic/vf_clipfrac": ((clipped > unclipped) * loss_mask).sum().item() / num_tokens,
            "critic/values_mean": (values * loss_mask).sum().item() / num_tokens,
            "critic/returns_mean": (returns * loss_mask).sum().item() / num_tokens,
        }
    return LossOutput(loss=loss, metrics=metrics)


def add_losses(first: LossOutput, second: LossOutput) -> LossOutput:
    """The sum of two terms of one loss."""
    return LossOutput(loss=first.loss + second.loss, metrics=first.metrics | second.metrics)


def _clipped_surrogate(
    ratio: torch.Tensor, bounded: torch.Tensor, advantages: torch.Tensor, dual_clip: float | None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of each token, and where each clip took effect, by the name of its metric."""
    unclipped, clipped = -advantages * ratio, -advantages * bounded
    losses, clips = torch.maximum(unclipped, clipped), {"actor/pg_clipfrac": clipped > unclipped}
    if dual_clip is None:
        return losses, clips
    is_bounded = (advantages < 0) & (losses > -advantages * dual_clip)
    return torch.where(is_bounded, -advantages * dual_clip, losses), {**clips, "actor/pg_clipfrac_lower": is_bounded}


def _require_dual_clip(dual_clip: float, objective: Objective, clip_high: float) -> None:
    if objective != "clip":
        raise ValueError(f"dual_clip={dual_clip} belongs to objective='clip'; leave it None with {objective!r}")
    if dual_clip <= 1.0 + clip_high:
        raise ValueError(f"dual_clip={dual_clip} must be above 1 + clip_high = {1.0 + clip_high}; None leaves it out")


def _require_count(name: str, value: int | None) -> int:
    if value is None or value < 1:
        raise ValueError(f"{name}={value} must be at least 1: it counts the whole batch, and one without has no loss")
    return value


def _require_samples(sample_index: torch.Tensor | None, who: str) -> torch.Tensor:
    if sample_index is None:
        raise ValueError(f"{who} needs sample_index, which says what sample each token belongs to")
    return sample_index
