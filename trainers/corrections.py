"""Corrections: weights for tokens that another policy drew than the one about to be updated.

Three policies are kept apart (the decoupled objective; arXiv 2110.00641, AReaL arXiv 2505.24298): the *behaviour*
policy drew the tokens, the *proximal* one is the trainer's before its first update on them, the *current* one takes the
gradient. `policy_loss` clips current / proximal; the weights here carry proximal / behaviour. On policy both sides
hold the same bits, and every weight is exactly 1. C counts the target tokens of a packed batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import compress

import torch

from rollout import Rollout
from trainers.choices import Correction, require_choice
from trainers.packed import sample_means, sample_sums


@torch.no_grad()
def correction_weights(
    proximal_logprobs: torch.Tensor,
    behaviour_logprobs: torch.Tensor,
    loss_mask: torch.Tensor,
    sample_index: torch.Tensor,
    *,
    correction: Correction = "token-truncate",
    low: float = 0.0,
    high: float = 2.0,
) -> torch.Tensor:
    """The weight [C] of each token, from the ratio w = proximal / behaviour; 1 everywhere for "none".

    "token-truncate": w held within [low, high] (truncated importance sampling). "token-mask": w, and 0 outside
    (IcePop). "sequence-truncate", "sequence-mask": the same of the sample's whole ratio, on each of its tokens.
    "token-truncate-sequence-mask": the token's w, truncated at high, where the geometric mean of the sample's ratios
    is within [low, high], else 0. The first four are TRL's modes, the last is OpenRLHF's seq-mask-tis.
    """
    require_choice("correction", correction, Correction)
    if not 0.0 <= low <= 1.0 <= high:
        raise ValueError(
            f"low={low} and high={high} must have 1, the ratio on policy, between them, and low at least 0"
        )
    logratio = (proximal_logprobs - behaviour_logprobs) * loss_mask
    if correction == "none":
        return torch.ones_like(logratio)
    ratio = (sample_sums(logratio, sample_index) if correction.startswith("sequence") else logratio).exp()
    if correction.endswith("-mask"):
        judged = ratio
        if correction == "token-truncate-sequence-mask":
            judged = sample_means(logratio, loss_mask, sample_index).exp()
            ratio = ratio.clamp(max=high)
        return torch.where((judged >= low) & (judged <= high), ratio, 0.0)
    return ratio.clamp(low, high)


def effective_sample_size(weights: torch.Tensor, loss_mask: torch.Tensor) -> float:
    """(sum w)^2 / (n sum w^2) over the n unmasked tokens of the whole batch: the share of them that still counts.

    1.0 where all weights are equal, 1 / n where one token has all the weight, 0.0 where all weights are 0.
    """
    counted = (weights * loss_mask).double()
    squares = counted.square().sum() * loss_mask.double().sum()
    return (counted.sum().square() / squares).item() if squares > 0 else 0.0


def truncation_weights(kept_mass: torch.Tensor) -> torch.Tensor:
    """Weights for tokens drawn under top_p, top_k or min_p: the share of the distribution that could be drawn.

    A drawn token's probability was p / kept_mass, p being the full distribution's at that temperature, so p over it is
    kept_mass; exactly 1 where nothing was cut. What was cut off is never drawn: its part of the mean stays missing.
    kept_mass: [C] as Rollout has it.
    """
    if bool(((kept_mass <= 0) | (kept_mass > 1)).any()):
        raise ValueError(f"kept_mass={kept_mass.tolist()} must be above 0 and at most 1")
    return kept_mass.float()


def untruncated_logprobs(rollout_logprobs: torch.Tensor, kept_mass: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of the full distribution, [C], from those of the truncated one that was sampled from.

    They are what a trainer's forward gives, so a ratio to them starts near 1 rather than near kept_mass; the same bits
    where nothing was cut.
    """
    return rollout_logprobs + truncation_weights(kept_mass).log()


def token_staleness(rollouts: Sequence[Rollout], policy_version: int) -> torch.Tensor:
    """How many versions behind `policy_version` each trained token was drawn; [num_tokens] int32.

    From the stamps that the engine left on every token; those with a loss_mask of 0 are left out.
    """
    stamps = [version for r in rollouts for version in compress(r.policy_versions, r.loss_mask)]
    return policy_version - torch.tensor(stamps, dtype=torch.int32)


def staleness_metrics(rollouts: Sequence[Rollout], policy_version: int) -> dict[str, float]:
    """staleness/mean and /max over the trained tokens, in versions; nothing where there is no token."""
    staleness = token_staleness(rollouts, policy_version)
    if not staleness.numel():
        return {}
    return {"staleness/mean": staleness.float().mean().item(), "staleness/max": int(staleness.max())}
