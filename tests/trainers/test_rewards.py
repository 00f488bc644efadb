from __future__ import annotations

import asyncio
import logging
import math

import pytest
import torch
from reward_functions import largest_of_group, raises_at_4, value, value_later

from trainers.reward_calls import require_columns
from trainers.rewards import Rewards, RewardScorer

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 3 =", "answer": "5"}]


@pytest.fixture
def groups(make_rollout):
    """Two groups of three samples with the texts 0, 1, 2 | 3, 4, 5."""
    return [[make_rollout([1], [2], text=f" {3 * p + i}", index=i) for i in range(3)] for p in range(2)]


def score_here(functions, rows, groups) -> Rewards:
    with RewardScorer(functions, num_processes=0, timeout=0.2) as scorer:
        return scorer.score(rows, groups)


def test_a_function_gets_one_entry_per_sample_in_every_list(groups):
    seen = []

    def record(prompts, completions, **columns):
        seen.append(dict(prompts=prompts, completions=completions, **columns))
        return [0.0] * 3

    score_here([record], ROWS, groups)
    assert [call["prompts"] for call in seen] == [["1 + 1 ="] * 3, ["2 + 3 ="] * 3]
    assert [call["completions"] for call in seen] == [[" 0", " 1", " 2"], [" 3", " 4", " 5"]]
    assert [call["answer"] for call in seen] == [["2"] * 3, ["5"] * 3]
    assert seen[0]["completion_ids"] == [[2]] * 3


def test_rewards_land_on_their_samples(groups):
    def is_right(completions, answer):
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    rewards = score_here([is_right], ROWS, groups)
    assert rewards.total.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert rewards.num_failed == rewards.num_timed_out == 0


def test_functions_add_up_under_their_own_names(groups):
    def one(completions):
        return [1.0] * len(completions)

    rewards = score_here([one, value_later], ROWS, groups)
    assert rewards.total.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert list(rewards.by_function) == ["one", "value_later"]
    assert rewards.by_function["value_later"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_chat_prompts_get_chat_completions(groups):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": [{"role": "user", "content": "ho"}]}]

    def read(prompts, completions):
        assert prompts[2] in ([{"role": "user", "content": "hi"}], [{"role": "user", "content": "ho"}])
        return [float(completion[-1]["content"]) for completion in completions]

    assert score_here([read], rows, groups).total.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def raises(completions):
    raise RuntimeError("no judge today")


def raises_type_error(completions, a_column_that_is_missing):
    return [1.0] * len(completions)


def exits(completions):
    raise SystemExit(1)


async def raises_later(completions):
    raise RuntimeError("no judge today")


def returns_too_many(completions):
    return [1.0] * (len(completions) + 1)


def returns_nothing(completions):
    return None


def returns_a_number(completions):
    return 1.0


@pytest.mark.parametrize(
    "function", [raises, raises_type_error, exits, raises_later, returns_too_many, returns_nothing, returns_a_number]
)
def test_a_failing_function_masks_and_counts_its_samples(groups, function):
    def fine(completions):
        return [1.0] * len(completions)

    rewards = score_here([fine, function], ROWS, groups)
    assert rewards.total.isnan().all()
    assert (rewards.num_failed, rewards.num_timed_out) == (6, 0)
    assert torch.equal(rewards.by_function["fine"], torch.ones(2, 3))


def test_a_sample_that_makes_a_function_raise_is_masked_alone(groups):
    rewards = score_here([raises_at_4], ROWS, groups)
    assert rewards.total.isnan().tolist() == [[False, False, False], [False, True, False]]
    assert (rewards.num_failed, rewards.num_timed_out) == (1, 0)


def test_coroutines_that_wait_too_long_are_timed_out_in_this_process_too(groups):
    async def waits(completions):
        await asyncio.sleep(1000 if " 4" in completions else 0)
        return [1.0] * len(completions)

    rewards = score_here([waits], ROWS, groups)
    assert rewards.total.isnan().tolist() == [[False, False, False], [False, True, False]]
    assert (rewards.num_failed, rewards.num_timed_out) == (0, 1)


def test_single_values_that_are_no_numbers_mask_their_sample(groups):
    def mixed(completions):
        return [1.0, None, math.nan] if " 0" in completions else [math.inf, "seven", 2]

    rewards = score_here([mixed], ROWS, groups)
    assert rewards.total.isnan().tolist() == [[False, True, True], [True, True, False]]
    assert rewards.total[1, 2] == 2.0
    assert rewards.num_failed == 3  # None is an answer: masked, but no failure


def test_arrays_and_tensors_count_as_lists(groups):
    def tensor(completions):
        return torch.arange(3.0)

    assert score_here([tensor], ROWS, groups).total.tolist() == [[0.0, 1.0, 2.0]] * 2


def test_async_functions_run_inside_a_running_event_loop(groups):
    async def notebook():
        return score_here([value_later], ROWS, groups)

    assert asyncio.run(notebook()).total.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_a_function_that_compares_samples_never_sees_a_part_of_a_group(groups, monkeypatch):
    monkeypatch.setattr(largest_of_group, "calls", 0)
    rewards = score_here([largest_of_group], ROWS, groups)
    assert rewards.total.isnan().tolist() == [[True] * 3, [False] * 3]
    assert rewards.total[1].tolist() == [0.0, 0.0, 1.0]


def test_each_kind_of_failure_is_logged_once_with_its_traceback(groups, caplog):
    with caplog.at_level(logging.WARNING), RewardScorer([raises, value], num_processes=0) as scorer:
        scorer.score(ROWS, groups)
        scorer.score(ROWS, groups)
    (record,) = caplog.records
    message = record.getMessage()
    assert "reward function raises: samples masked (RuntimeError)" in message
    assert 'raise RuntimeError("no judge today")' in message
    assert message.endswith("RuntimeError: no judge today")


def test_a_group_can_be_submitted_and_gathered_later(groups):
    with RewardScorer([value], num_processes=0) as scorer:
        pending = [scorer.submit(row, group) for row, group in zip(ROWS, groups, strict=True)]
        assert all(each.done() for each in pending)
        assert pending[1].result().total.tolist() == [[3.0, 4.0, 5.0]]
        assert torch.equal(scorer.gather(pending).total, scorer.score(ROWS, groups).total)


def test_functions_need_different_names(groups):
    with pytest.raises(ValueError, match="different names"):
        RewardScorer([raises, raises])
    with pytest.raises(ValueError, match="no reward function"):
        RewardScorer([])


@pytest.mark.parametrize(("num_processes", "timeout"), [(-1, 1.0), (1, 0.0)])
def test_wrong_limits_are_named(num_processes: int, timeout: float):
    with pytest.raises(ValueError, match=f"num_processes={num_processes} .*timeout={timeout} "):
        RewardScorer([raises], num_processes=num_processes, timeout=timeout)


def test_a_column_that_a_function_needs_and_the_data_lack_is_named():
    def judge(completions, solution, *, level=1, **columns):
        return []

    require_columns([judge, value], ["solution"])
    with pytest.raises(ValueError, match=r"reward function judge takes \['solution'\]; there are \['answer', "):
        require_columns([judge], ["answer"])
