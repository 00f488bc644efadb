from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest

from recipes.data import load_problems
from recipes.math_equality import equals
from recipes.rewards import (
    exact_match,
    last_number,
    make_reward,
    math_verify,
    numeric,
    tagged_answer,
    task_score,
)
from trainers.rewards import RewardScorer


def test_exact_match_ignores_white_space_at_the_ends_only():
    completions = [" 37", "37\n", " 3 7", "37 or so", ""]
    assert exact_match(completions, completions, answer=[" 37"] * 5) == [1.0, 1.0, 0.0, 0.0, 0.0]


def test_the_answer_may_be_called_ground_truth_and_the_completion_a_message():
    completions = [[{"role": "assistant", "content": "yes"}]]
    assert exact_match(["q"], completions, ground_truth=["yes"], level=["easy"]) == [1.0]


def test_a_missing_answer_column_is_named():
    with pytest.raises(ValueError, match=r"needs the column `answer` or `ground_truth`; there are \['level'\]"):
        exact_match(["q"], ["a"], level=["easy"])


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("it is 1,234.50 in all", 1234.5),
        ("3 + 4 = 7", 7.0),
        ("12-5", 5.0),
        ("minus -5", -5.0),
        ("#### 42", 42.0),
        ("so .5.", 0.5),
        ("1,2", 2.0),
        ("none", None),
    ],
)
def test_last_number(text: str, number: float | None):
    assert last_number(text) == number


def test_numeric_masks_samples_whose_answer_holds_no_number():
    completions = ["the sum is 42.0", "41", "no idea", "42"]
    assert numeric(completions, completions, answer=["#### 42", "42", "42", "none"]) == [1.0, 0.0, 0.0, None]


def test_task_score_asks_the_task_itself():
    rows = load_problems("chain_sum", num_rows=4, num_held_out=0, seed=3).train_rows
    completions = [rows[0]["answer"], f"Let me see. <answer>{rows[1]['answer']}</answer>", "0.5 apples", ""]
    columns = {name: [row[name] for row in rows] for name in rows[0] if name != "prompt"}
    rewards = task_score([row["prompt"] for row in rows], completions, **columns)
    assert rewards[:2] == [1.0, 1.0]
    assert all(reward < 0.5 for reward in rewards[2:])


def test_tagged_answer_is_the_last_one():
    assert tagged_answer("<answer>1</answer> no, <answer> 2\n</answer>.") == "2"
    assert tagged_answer(" 3 ") == "3"


@pytest.mark.parametrize(
    ("completion", "answer", "is_right"),
    [
        ("so it is $\\frac{1}{2}$", "0.5", True),
        ("\\boxed{x^2 + 2x + 1}", "$(x+1)^2$", True),
        ("the answer is 1/3", "1/2", False),
        ("no idea", "1/2", False),
        ("x^2+1", "x^2+1", True),
        ("7", "", None),
    ],
)
def test_mathematical_equality(completion: str, answer: str, is_right: bool | None):
    assert equals(completion, answer) is is_right


def test_math_verify_works_outside_the_main_thread():
    completions = ["it is 1/2", "it is 1/3", "?"]
    with ThreadPoolExecutor(1) as executor:
        rewards = executor.submit(math_verify, completions, completions, answer=["0.5", "0.5", ""]).result()
    assert rewards == [1.0, 0.0, None]


def test_an_answer_that_takes_math_verify_too_long_is_masked_and_its_siblings_judged():
    rows = [{"prompt": "q", "answer": "$" + "8^" * 8 + "8$"}]
    group = [SimpleNamespace(text=text, token_ids=[]) for text in ("no idea", "$" + "9^" * 8 + "9$", "")]
    with RewardScorer([math_verify], timeout=8.0) as scorer:
        assert scorer.score([{"prompt": "q", "answer": "2"}], [[group[0]]]).total.tolist() == [[0.0]]
        rewards = scorer.score(rows, [group])
    assert rewards.total.isnan().tolist() == [[False, True, False]]
    assert rewards.num_timed_out == 1


def test_rewards_are_chosen_to_fit_the_data():
    task_rows = [{"prompt": "q", "answer": "1", "metadata": {}, "task": "chain_sum"}]
    assert make_reward("auto", "sums", []).__name__ == "exact_match"
    assert make_reward("auto", "chain_sum", task_rows).__name__ == "task_score"
    assert make_reward("auto", "my.jsonl", [{"prompt": "q", "answer": "1"}]).__name__ == "math_verify"
    with pytest.raises(ValueError, match="needs a task of reasoning_gym"):
        make_reward("task_score", "my.jsonl", [{"prompt": "q", "answer": "1"}])
    with pytest.raises(ValueError, match="reward='exact' is unknown; choose one of auto, exact_match"):
        make_reward("exact", "sums", [])  # type: ignore[arg-type]
