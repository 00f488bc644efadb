"""Shares: which samples each trainer rank trains on, so that all have about as many rows and as many micro-batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

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
    parts = _checked_parts(rollouts, num_ranks)
    num_rounds = max(len(split_samples([rollouts[i] for i in part], max_tokens, share_prompts)) for part in parts)
    own = [rollouts[i] for i in parts[rank]], [advantages[i] for i in parts[rank]]
    batches = pack_micro_batches(*own, max_tokens, share_prompts)
    return batches + [idle_batch()] * (num_rounds - len(batches))


def rank_samples(rollouts: Sequence[Rollout], *, rank: int, num_ranks: int) -> list[Rollout]:
    """The rank's samples, where ranks need not keep in step: only a forward that none waits for comes of them.

    ValueError as in `rank_micro_batches`.
    """
    return [rollouts[i] for i in _checked_parts(rollouts, num_ranks)[rank]]


def split_by_rows(rollouts: Sequence[Rollout], num_ranks: int) -> list[list[int]]:
    """Indices of the samples of each rank: consecutive, whole samples, with rows shared out as evenly as these allow.

    A rank may get none. A group that is cut has its prompt on both sides.
    """
    parts: list[list[int]] = [[] for _ in range(num_ranks)]
    rank, num_rows = 0, 0  # of the part that is filled now
    num_left = sum(_sample_rows(rollout, is_first) for rollout, is_first in _with_beginnings(rollouts))
    for index, (rollout, is_first) in enumerate(_with_beginnings(rollouts)):
        cost = _sample_rows(rollout, is_first)
        is_full = num_rows + cost / 2 > num_left / (num_ranks - rank)
        if num_rows and is_full and rank + 1 < num_ranks:
            cost, num_left = _sample_rows(rollout, True), num_left - num_rows + _sample_rows(rollout, True) - cost
            rank, num_rows = rank + 1, 0
        parts[rank].append(index)
        num_rows += cost
    return parts


def _checked_parts(rollouts: Sequence[Rollout], num_ranks: int) -> list[list[int]]:
    """`split_by_rows` of samples that a trainer can take: each rank looks at all of them, so that all refuse alike."""
    for rollout in rollouts:
        check_is_reproducible(rollout)
    return split_by_rows(rollouts, num_ranks)


def _with_beginnings(rollouts: Sequence[Rollout]) -> Iterator[tuple[Rollout, bool]]:
    """The rollouts, each with whether it is the first to train of those that follow each other on one prompt."""
    group_id = None
    for rollout in rollouts:
        is_trained = any(rollout.loss_mask)
        yield rollout, is_trained and rollout.group_id != group_id
        group_id = rollout.group_id if is_trained else group_id


def _sample_rows(rollout: Rollout, is_first: bool) -> int:
    """Rows that a sample adds; none where there is nothing to train."""
    if not any(rollout.loss_mask):
        return 0
    return len(rollout.token_ids) - 1 + (len(rollout.prompt_token_ids) if is_first else 0)
