from __future__ import annotations

import pytest
from reward_functions import compute_score, compute_score_later

from trainers.rewards import RewardScorer
from trainers.verl_rewards import from_verl

ROW = {"prompt": "1 + 1 =", "data_source": "sums", "ground_truth": "2", "extra_info": {"index": 7}}


@pytest.fixture
def group(make_rollout):
    return [make_rollout([1], [2], text=text) for text in ("2", "3", "?")]


@pytest.mark.parametrize("function", [compute_score, compute_score_later])
@pytest.mark.parametrize("num_processes", [0, 1])
def test_scores_are_rewards_whether_awaited_or_not(group, function, num_processes):
    with RewardScorer([from_verl(function)], num_processes=num_processes) as scorer:
        rewards = scorer.score([ROW], [group])
    assert list(rewards.by_function) == [function.__name__]
    assert rewards.total[0, :2].tolist() == [1.0, 0.0]
    assert rewards.total.isnan().tolist() == [[False, False, True]]
    assert rewards.num_failed == 0  # a score of None masks


@pytest.mark.parametrize(
    "columns", [{"answer": ["2"]}, {"ground_truth": ["2"]}, {"reward_model": [{"style": "rule", "ground_truth": "2"}]}]
)
def test_the_right_answer_is_found_under_its_names(columns):
    reward = from_verl(compute_score, data_source="sums")
    assert reward(prompts=["q"], completions=[[{"role": "assistant", "content": "2"}]], **columns) == [1.0]


def test_missing_columns_and_scores_are_named():
    with pytest.raises(ValueError, match=r"column `data_source`, or from_verl\(.*\); there are \['answer'"):
        from_verl(compute_score)(prompts=["q"], completions=["2"], answer=["2"])
    with pytest.raises(ValueError, match=r"`ground_truth`, `answer` or `reward_model`; there are \['data_source'\]"):
        from_verl(compute_score)(prompts=["q"], completions=["2"], data_source=["sums"])
    with pytest.raises(ValueError, match=r"keys \['acc'\], but no \"score\""):
        from_verl(lambda **question: {"acc": 1.0}, data_source="sums")(prompts=["q"], completions=["2"], answer=["2"])
