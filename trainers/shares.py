"""Shares: which samples each trainer rank trains on, so that all have about as many rows and as many micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

from rollout import Rollout
from trainers.batch import PackedBatch, check_is_reproducible, idle_batch, pack_micro_batches, split_samples


def rank_micro_batches(
    rollouts: Sequence[Rollout],
    advantages: Sequence[float],
    *,
    rank: int,
    num_ranks: int,
    max_tokens: int,
    share_prompts: bool = True,
) -> list[PackedBatch]:
    """The rank's micro-batches of at most max_tokens rows; with one rank, `pack_micro_batches`.

    Each rank is given all rollouts, and works out by itself how many micro-batches the others have: those that run out
    take part with idle ones. ValueError, on every rank, for what `pack` does not take.
    """
    if num_ranks == 1:
        return pack_micro_batches(rollouts, advantages, max_tokens, share_prompts)
    if len(advantages) != len(rollouts):
        raise ValueError(f"{len(advantages)} advantages for {len(rollouts)} rollouts: give one for each")
    for rollout in rollouts:
        check_is_reproducible(rollout)
    parts = split_by_rows(rollouts, num_ranks)
    num_rounds = max(len(split_samples([rollouts[i] for i in part], max_tokens, share_prompts)) for part in parts)
    own = [rollouts[i] for i in parts[rank]], [advantages[i] for i in parts[rank]]
    batches = pack_micro_batches(*own, max_tokens, share_prompts)
    return batches + [idle_batch()] * (num_rounds - len(batches))


def split_by_rows(rollouts: Sequence[Rollout], num_ranks: int) -> list[list[int]]:
    """Indices of the samples of each rank: consecutive, whole samples, with rows shared out as evenly as these allow.

    A rank may get none. A prompt is counted once, for the first of the samples that follow each other on it.
    """
    ends = list(accumulate(_num_rows(rollouts)))
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    for index, (start, end) in enumerate(zip([0, *ends], ends)):
        middle = (start + end) * num_ranks // (2 * ends[-1]) if ends[-1] else 0
        parts[min(middle, num_ranks - 1)].append(index)
    return parts


def _num_rows(rollouts: Sequence[Rollout]) -> Iterator[int]:
    """Rows of each sample; none where there is nothing to train."""
    group_id = None
    for rollout in rollouts:
        if not any(rollout.loss_mask):
            yield 0
            continue
        is_first, group_id = rollout.group_id != group_id, rollout.group_id
        yield len(rollout.token_ids) - 1 + (len(rollout.prompt_token_ids) if is_first else 0)
