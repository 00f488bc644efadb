from __future__ import annotations

import pytest
import torch

from engine import SamplingParams
from trainers import pack_micro_batches
from trainers.batch import idle_batch
from trainers.shares import rank_micro_batches, split_by_rows


@pytest.fixture
def rollouts(make_rollout):
    """Five groups of four samples, the longer the later, on prompts of 3 to 11 tokens."""
    return [
        make_rollout(range(3 + 2 * group), range(1, 2 + group + index), group_id=f"g{group}", index=index)
        for group in range(5)
        for index in range(4)
    ]


def num_rows(batches) -> int:
    return sum(batch.num_rows for batch in batches if batch.num_targets)


def share(rollouts, num_ranks, max_tokens=16):
    advantages = [float(i) for i in range(len(rollouts))]
    return [
        rank_micro_batches(rollouts, advantages, rank=rank, num_ranks=num_ranks, max_tokens=max_tokens)
        for rank in range(num_ranks)
    ]


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 7, 20, 30])
def test_every_sample_is_one_ranks_and_none_is_cut(rollouts, num_ranks):
    parts = split_by_rows(rollouts, num_ranks)
    assert len(parts) == num_ranks
    assert [index for part in parts for index in part] == list(range(len(rollouts)))


@pytest.mark.parametrize("num_ranks", [2, 3, 4])
def test_rows_are_shared_out_evenly(rollouts, num_ranks):
    rows = [num_rows(batches) for batches in share(rollouts, num_ranks, max_tokens=1000)]
    longest = max(len(r.prompt_token_ids) + len(r.token_ids) for r in rollouts)
    assert max(rows) - min(rows) <= longest  # a sample is not cut, and a cut group has its prompt on both sides


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 30])
def test_ranks_have_the_same_number_of_micro_batches_and_all_tokens_once(rollouts, num_ranks):
    shares = share(rollouts, num_ranks)
    assert len({len(batches) for batches in shares}) == 1
    whole = torch.cat([batch.target_ids for batch in share(rollouts, 1)[0]])
    assert torch.equal(torch.cat([batch.target_ids for batches in shares for batch in batches]), whole)
    advantages = torch.cat([batch.advantages for batches in shares for batch in batches])
    assert torch.equal(advantages, torch.cat([batch.advantages for batch in share(rollouts, 1)[0]]))


def test_one_rank_has_the_micro_batches_of_a_trainer_alone(rollouts):
    advantages = [float(i) for i in range(len(rollouts))]
    for own, alone in zip(share(rollouts, 1)[0], pack_micro_batches(rollouts, advantages, 16), strict=True):
        assert torch.equal(own.input_ids, alone.input_ids)
        assert own.segments == alone.segments


def test_samples_without_a_token_to_train_count_for_nothing(make_rollout, rollouts):
    masked = [make_rollout(range(200), [1, 2], group_id="m", loss_mask=[0, 0]) for _ in range(4)]
    assert [num_rows(batches) for batches in share(masked + rollouts, 2)] == [
        num_rows(batches) for batches in share(rollouts, 2)
    ]
    assert [len(batches) for batches in share(masked, 3)] == [0, 0, 0]
    assert share([], 2) == [[], []]


def test_an_idle_batch_predicts_nothing():
    batch = idle_batch()
    assert (batch.num_rows, batch.num_targets) == (1, 0)


def test_what_one_rank_would_refuse_every_rank_refuses(make_rollout, rollouts):
    with pytest.raises(ValueError, match="2 advantages for 20 rollouts"):
        rank_micro_batches(rollouts, [0.0, 1.0], rank=1, num_ranks=2, max_tokens=16)
    changed = SamplingParams(repetition_penalty=1.5)
    refused = [make_rollout([1], [2], kept_mass=[0.5], sampling_params=changed), *rollouts]
    for rank in range(2):
        with pytest.raises(ValueError, match=r"repetition_penalty=1\.5"):
            rank_micro_batches(refused, [0.0] * 21, rank=rank, num_ranks=2, max_tokens=16)
