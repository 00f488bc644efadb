from __future__ import annotations

import asyncio
import math

import pytest
import torch

from trainers.rewards import score

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 3 =", "answer": "5"}]


@pytest.fixture
def groups(make_rollout):
    """Two groups of three samples with the texts 0, 1, 2 | 3, 4, 5."""
    return [[make_rollout([1], [2], text=f" {3 * p + i}", index=i) for i in range(3)] for p in range(2)]


def test_a_function_gets_one_entry_per_sample_in_every_list(groups):
    seen = {}

    def record(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0] * 6

    score([record], ROWS, groups)
    assert seen["prompts"] == ["1 + 1 ="] * 3 + ["2 + 3 ="] * 3
    assert seen["completions"] == [" 0", " 1", " 2", " 3", " 4", " 5"]
    assert seen["answer"] == ["2"] * 3 + ["5"] * 3


def test_rewards_land_on_their_samples(groups):
    def is_right(completions, answer):
        return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]

    rewards = score([is_right], ROWS, groups)
    assert rewards.total.tolist() == [[0.0, 0.0, 1.0], [0.0, 0.0, 1.0]]
    assert rewards.num_failed == 0


def test_functions_add_up_under_their_own_names(groups):
    def one(completions):
        return [1.0] * len(completions)

    async def value(completions):
        await asyncio.sleep(0)
        return [float(text) for text in completions]

    rewards = score([one, value], ROWS, groups)
    assert rewards.total.tolist() == [[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]
    assert list(rewards.by_function) == ["one", "value"]
    assert rewards.by_function["value"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_chat_prompts_get_chat_completions(groups):
    rows = [{"prompt": [{"role": "user", "content": "hi"}]}, {"prompt": [{"role": "user", "content": "ho"}]}]

    def read(prompts, completions):
        assert prompts[5] == [{"role": "user", "content": "ho"}]
        return [float(completion[-1]["content"]) for completion in completions]

    assert score([read], rows, groups).total.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def raises(completions):
    raise RuntimeError("no judge today")


def raises_type_error(completions, a_column_that_is_missing):
    return [1.0] * 6


async def raises_later(completions):
    raise RuntimeError("no judge today")


def returns_too_few(completions):
    return [1.0] * 5


def returns_nothing(completions):
    return None


def returns_a_number(completions):
    return 1.0


@pytest.mark.parametrize(
    "function", [raises, raises_type_error, raises_later, returns_too_few, returns_nothing, returns_a_number]
)
def test_a_failing_function_masks_and_counts_its_samples(groups, function):
    def fine(completions):
        return [1.0] * 6

    rewards = score([fine, function], ROWS, groups)
    assert rewards.total.isnan().all()
    assert rewards.num_failed == 6
    assert torch.equal(rewards.by_function["fine"], torch.ones(2, 3))


def test_single_values_that_are_no_numbers_mask_their_sample(groups):
    def mixed(completions):
        return [1.0, None, math.nan, math.inf, "seven", 2]

    rewards = score([mixed], ROWS, groups)
    assert rewards.total.isnan().tolist() == [[False, True, True], [True, True, False]]
    assert rewards.total[1, 2] == 2.0
    assert rewards.num_failed == 3  # None is an answer: masked, but no failure


def test_arrays_and_tensors_count_as_lists(groups):
    def tensor(completions):
        return torch.arange(6.0)

    assert score([tensor], ROWS, groups).total.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_async_functions_run_inside_a_running_event_loop(groups):
    async def value(completions):
        await asyncio.sleep(0)
        return [1.0] * 6

    async def notebook():
        return score([value], ROWS, groups)

    assert asyncio.run(notebook()).total.tolist() == [[1.0] * 3] * 2


def test_functions_need_different_names(groups):
    with pytest.raises(ValueError, match="different names"):
        score([raises, raises], ROWS, groups)
    with pytest.raises(ValueError, match="no reward function"):
        score([], ROWS, groups)
