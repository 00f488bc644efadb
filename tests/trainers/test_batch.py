from __future__ import annotations

import pytest
import torch

from engine import SamplingParams
from trainers.batch import pack, pack_micro_batches, pack_tokens, split_samples


def spans(batch) -> list[tuple[int, int, int | None]]:
    return [(segment.start_row, segment.end_row, segment.parent) for segment in batch.segments]


@pytest.fixture
def group(make_rollout):
    """Prompt 7 8 9 with completions 1 2 3 | 4 | 5 6."""
    completions = ([1, 2, 3], [4], [5, 6])
    return [make_rollout([7, 8, 9], token_ids, index=i) for i, token_ids in enumerate(completions)]


def test_a_shared_prompt_stands_once_before_its_completions(group):
    batch = pack(group, [1.0, -1.0, 0.5])
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 2, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 3]
    assert spans(batch) == [(0, 3, None), (3, 5, 0), (5, 6, 0)]
    assert batch.target_rows.tolist() == [2, 3, 4, 2, 2, 5]  # the prompt's last row predicts every first token
    assert batch.target_ids.tolist() == [1, 2, 3, 4, 5, 6]
    assert batch.sample_index.tolist() == [0, 0, 0, 1, 2, 2]
    assert batch.advantages.tolist() == [1.0, 1.0, 1.0, -1.0, 0.5, 0.5]
    assert (batch.num_rows, batch.num_targets) == (6, 6)


def test_an_unshared_prompt_stands_before_each_completion(group):
    batch = pack(group, [1.0, -1.0, 0.5], share_prompts=False)
    assert batch.input_ids.tolist() == [7, 8, 9, 1, 2, 7, 8, 9, 7, 8, 9, 5]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]
    assert spans(batch) == [(0, 5, None), (5, 8, None), (8, 12, None)]
    assert batch.target_rows.tolist() == [2, 3, 4, 7, 10, 11]
    assert batch.target_ids.tolist() == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_every_target_follows_the_token_of_its_row(group, make_rollout, share_prompts):
    rollouts = [*group, make_rollout([3], [6, 6, 5], group_id="g1")]
    batch = pack(rollouts, [0.0] * 4, share_prompts)
    for row, target, sample in zip(batch.target_rows, batch.target_ids, batch.sample_index, strict=True):
        whole = rollouts[sample].prompt_token_ids + rollouts[sample].token_ids
        position = batch.positions[row]
        assert batch.input_ids[row] == whole[position]
        assert target == whole[position + 1]


def test_types_are_those_of_the_contract(group):
    batch = pack(group, [1.0, -1.0, 0.5])
    assert batch.positions.dtype == batch.sample_index.dtype == torch.int32
    assert batch.input_ids.dtype == batch.target_rows.dtype == batch.target_ids.dtype == torch.int64
    for column in (batch.temperature, batch.rollout_logprobs, batch.advantages, batch.loss_mask):
        assert column.dtype == torch.float32
        assert column.shape == (6,)


def test_token_columns_come_from_their_rollout(make_rollout):
    first = make_rollout([7], [1, 2], logprobs=[-1.0, -2.0], loss_mask=[1, 0])
    second = make_rollout([7], [3], index=1, logprobs=[-3.0], sampling_params=SamplingParams(temperature=0.5))
    batch = pack([first, second], [0.0, 0.0])
    assert batch.rollout_logprobs.tolist() == [-1.0, -3.0]
    assert batch.loss_mask.tolist() == [1.0, 1.0]
    assert batch.temperature.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("share_prompts", [True, False])
def test_a_masked_token_is_seen_by_its_successors_and_nobodys_target(make_rollout, share_prompts):
    rollout = make_rollout([7, 8], [1, 2, 3, 4], loss_mask=[1, 0, 0, 1], logprobs=[-1.0, 0.0, 0.0, -4.0])
    batch = pack([rollout], [0.5], share_prompts)
    assert batch.input_ids.tolist() == [7, 8, 1, 2, 3]
    assert batch.target_rows.tolist() == [1, 4]
    assert batch.target_ids.tolist() == [1, 4]
    assert batch.rollout_logprobs.tolist() == [-1.0, -4.0]
    assert batch.advantages.tolist() == [0.5, 0.5]
    assert batch.sample_index.tolist() == [0, 0]


def test_a_sample_that_is_masked_throughout_takes_no_rows(make_rollout):
    masked = make_rollout([7, 8], [1, 2], loss_mask=[0, 0])
    batch = pack([masked, make_rollout([7, 8], [5], index=1)], [0.0, 1.0])
    assert batch.input_ids.tolist() == [7, 8]
    assert batch.sample_index.tolist() == [1]
    assert split_samples([masked], max_tokens=8) == []


def test_greedy_samples_are_measured_at_temperature_one(make_rollout):
    batch = pack([make_rollout([7], [1], sampling_params=SamplingParams(temperature=0.0))], [0.0])
    assert batch.temperature.tolist() == [1.0]


def test_a_sample_of_a_changed_distribution_is_never_taken_for_an_on_policy_one(make_rollout):
    detail = {"raw_logprobs": [-0.7], "kept_mass": [0.9]}
    for changed in ({"min_tokens": 1}, {"presence_penalty": 0.5}, {"logit_bias": {3: 1.0}}, {"temperature": 0.7}):
        params = SamplingParams(top_p=0.9, **changed)
        other = make_rollout([7], [1], index=3, sampling_params=params, **detail)
        with pytest.raises(
            ValueError, match=rf"rollout g0\[3\] was drawn with {next(iter(changed))}=.*at their defaults"
        ):
            pack([make_rollout([7], [1]), other], [0.0, 0.0])
    listed = make_rollout([7], [1], top_logprobs=[{1: -0.5, 2: -1.0}])
    assert pack([listed], [0.0]).num_targets == 1


def test_truncated_samples_are_measured_under_the_whole_distribution(make_rollout):
    detail = {"raw_logprobs": [-0.7, -1.0, -2.0], "kept_mass": [0.9, 1.0, 0.5], "loss_mask": [1, 0, 1]}
    truncated = make_rollout([7], [1, 2, 3], index=3, sampling_params=SamplingParams(top_k=9), **detail)
    batch = pack([make_rollout([7], [1]), truncated], [0.0, 0.0])
    assert batch.rollout_logprobs.tolist() == pytest.approx([-0.5, -0.7, -2.0])
    assert batch.kept_mass.tolist() == pytest.approx([1.0, 0.9, 0.5])


def test_equal_prompts_of_other_groups_are_not_shared(make_rollout):
    batch = pack([make_rollout([7], [1]), make_rollout([7], [2], group_id="g1")], [0.0, 0.0])
    assert batch.input_ids.tolist() == [7, 7]


def test_a_sample_without_tokens_leaves_no_trace(make_rollout):
    aborted = make_rollout([7, 8], [], finish_reason="abort")
    batch = pack([aborted, make_rollout([7, 8], [5], index=1)], [0.0, 1.0])
    assert batch.input_ids.tolist() == [7, 8]
    assert batch.sample_index.tolist() == [1]
    assert pack([aborted], [0.0]).num_rows == 0


def test_small_groups_share_a_micro_batch_and_stay_whole(group, make_rollout):
    # rows: 6 for g0, 3 + 1 for g1, 6 for g2
    others = [make_rollout([1, 2, 3], [4, 5], group_id="g1")]
    last = [make_rollout([7, 8, 9], r.token_ids, group_id="g2", index=r.index) for r in group]
    rollouts = [*group, *others, *last]
    assert split_samples(rollouts, max_tokens=10) == [[0, 1, 2, 3], [4, 5, 6]]
    assert split_samples(rollouts, max_tokens=9) == [[0, 1, 2], [3], [4, 5, 6]]
    assert split_samples(rollouts, max_tokens=100) == [[0, 1, 2, 3, 4, 5, 6]]


def test_a_group_beyond_the_limit_is_cut_between_samples(group):
    assert split_samples(group, max_tokens=5) == [[0, 1], [2]]  # 3 + 2 + 0 rows, 3 + 1 rows
    assert split_samples(group, max_tokens=1) == [[0], [1], [2]]  # a sample is never cut


def test_micro_batches_hold_every_sample_once_within_the_limit(group, make_rollout):
    rollouts = [
        make_rollout([g] * (2 + g % 3), [5] * (1 + (i * g) % 7), group_id=f"g{g}", index=i)
        for g in range(1, 9)
        for i in range(4)
    ]
    for limit in (12, 20, 64):
        for share_prompts in (True, False):
            batches = pack_micro_batches(rollouts, [float(i) for i in range(32)], limit, share_prompts)
            assert all(batch.num_rows <= limit for batch in batches)
            sample_index = torch.cat([batch.sample_index for batch in batches])
            assert sample_index.unique_consecutive().tolist() == list(range(32))
            assert torch.equal(torch.cat([batch.advantages for batch in batches]), sample_index.float())
            assert sum(batch.num_targets for batch in batches) == sum(len(r.token_ids) for r in rollouts)


def test_given_tokens_are_packed_at_temperature_one():
    batch = pack_tokens([[1, 2], [3]], [[[4, 5], [6]], [[7]]])
    assert batch.input_ids.tolist() == [1, 2, 4, 3]
    assert spans(batch) == [(0, 2, None), (2, 3, 0), (3, 4, None)]
    assert batch.target_rows.tolist() == [1, 2, 1, 3]
    assert batch.target_ids.tolist() == [4, 5, 6, 7]
    assert batch.sample_index.tolist() == [0, 0, 1, 2]
    assert batch.temperature.tolist() == [1.0] * 4


def test_wrong_arguments_are_named(group):
    with pytest.raises(ValueError, match="2 advantages for 3 rollouts"):
        pack(group, [0.0, 1.0])
    with pytest.raises(ValueError, match="max_tokens=0"):
        split_samples(group, max_tokens=0)
