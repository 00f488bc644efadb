"""GAE: advantages and returns of tokens from their rewards and a critic's values.

B samples, T the tokens of the longest; C the tokens of a packed batch, of which each sample's stand together.
"""

from __future__ import annotations

import torch

from trainers.packed import to_padded


@torch.no_grad()
def gae_advantages(
    rewards: torch.Tensor,
    values: torch.Tensor,
    loss_mask: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Generalised advantage estimates and returns (arXiv 1506.02438 eq. 11-16), both [B, T] float32, 0 where masked.

    delta_t = r_t + gamma V_{t+1} - V_t; A_t = delta_t + gamma lam A_{t+1}; the return, which the critic learns, is
    A_t + V_t. rewards, values, loss_mask: [B, T]. Masked tokens (padding, observations of an episode) are no actions:
    the recursion steps over them and their rewards count nowhere. last_values: [B], what follows the last token; 0,
    as after an end, where None.
    """
    _require_discounts(gamma, lam)
    rewards, exact_values, is_action = rewards.double(), values.double(), loss_mask > 0
    next_values = torch.zeros_like(exact_values[:, 0]) if last_values is None else last_values.double()
    next_advantages = torch.zeros_like(next_values)
    advantages = torch.zeros_like(exact_values)
    for t in reversed(range(exact_values.shape[1])):
        delta = rewards[:, t] + gamma * next_values - exact_values[:, t]
        next_advantages = torch.where(is_action[:, t], delta + gamma * lam * next_advantages, next_advantages)
        next_values = torch.where(is_action[:, t], exact_values[:, t], next_values)
        advantages[:, t] = next_advantages
    advantages = advantages * is_action
    return advantages.float(), ((advantages + exact_values) * is_action).float()


def packed_gae(
    rewards: torch.Tensor,
    values: torch.Tensor,
    sample_index: torch.Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    last_values: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`gae_advantages` of a packed batch: rewards, values, sample_index and both results are [C].

    last_values: one per sample, in the order in which the samples are packed.
    """
    if not rewards.numel():
        return rewards.float(), values.float()
    padded_rewards, is_token = to_padded(rewards, sample_index)
    padded_values, _ = to_padded(values, sample_index)
    advantages, returns = gae_advantages(
        padded_rewards, padded_values, is_token, gamma=gamma, lam=lam, last_values=last_values
    )
    return advantages[is_token], returns[is_token]


def discounted_returns(rewards: torch.Tensor, sample_index: torch.Tensor, gamma: float = 1.0) -> torch.Tensor:
    """r_t + gamma r_{t+1} + ... to the end of each token's sample; rewards, sample_index, result: [C], float32."""
    return packed_gae(rewards, torch.zeros_like(rewards), sample_index, gamma=gamma, lam=1.0)[1]


def explained_variance(values: torch.Tensor, returns: torch.Tensor, loss_mask: torch.Tensor) -> float:
    """1 - Var(returns - values) / Var(returns) over the unmasked tokens of the whole batch, `critic/vf_explained_var`.

    1 is a perfect critic, 0 one that knows no more than the mean; NaN where the returns are all equal.
    """
    is_counted = loss_mask > 0
    values, returns = values.double()[is_counted], returns.double()[is_counted]
    variance = returns.var(correction=0)
    return (1.0 - (returns - values).var(correction=0) / variance).item() if variance > 0 else float("nan")


def _require_discounts(gamma: float, lam: float) -> None:
    for name, value in (("gamma", gamma), ("lam", lam)):
        if not 0.0 <= value <= 1.0:
            raise ValueError(f"{name}={value} must be between 0 and 1")
