"""Penalties: what is taken off rewards - for completions that run long, and for leaving the reference policy."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from trainers.packed import is_last_token


def overlong_penalty(lengths: Sequence[int], *, max_tokens: int, buffer_tokens: int) -> torch.Tensor:
    """DAPO's soft punishment, to be added to the rewards: 0 down to -1 (arXiv 2503.14476 eq. 13).

    lengths: completion tokens of each sample. Up to max_tokens - buffer_tokens costs nothing; within the buffer the
    penalty falls linearly to -1, which it stays at beyond max_tokens. Returns [len(lengths)] float32.
    """
    if not 0 <= buffer_tokens <= max_tokens:
        raise ValueError(f"buffer_tokens={buffer_tokens} must be between 0 and max_tokens={max_tokens}")
    excess = torch.tensor(lengths, dtype=torch.float64) - (max_tokens - buffer_tokens)
    # Without a buffer the penalty is a step: the first token too many costs all of it.
    return -(excess / max(1, buffer_tokens)).clamp(0.0, 1.0).float()


def token_rewards(
    scores: torch.Tensor, kl: torch.Tensor, sample_index: torch.Tensor, *, kl_coef: float
) -> torch.Tensor:
    """Rewards of tokens: -kl_coef KL on each, and the sample's score on its last (arXiv 2203.02155, section 3.5).

    scores: [C], the sample's score on each of its tokens. kl: [C], of `kl_estimate` between the policy that drew the
    tokens and the reference. Returns [C] float32, without gradient.
    """
    return (torch.where(is_last_token(sample_index), scores, 0.0) - kl_coef * kl).detach()
