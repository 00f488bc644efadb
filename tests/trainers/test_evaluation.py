from __future__ import annotations

from itertools import combinations

import pytest
import torch

from trainers import GRPOConfig
from trainers.evaluation import Evaluator, pass_at_k
from trainers.rewards import Rewards

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 2 =", "answer": "4"}]


@pytest.mark.parametrize(("num_samples", "num_right"), [(1, 0), (1, 1), (5, 2), (6, 6), (7, 1)])
def test_pass_at_k_is_the_share_of_draws_of_k_with_a_right_one(num_samples, num_right):
    is_right = [i < num_right for i in range(num_samples)]
    for k in range(1, num_samples + 1):
        draws = list(combinations(is_right, k))
        assert pass_at_k(num_samples, num_right, k) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_pass_at_more_than_was_drawn_is_refused():
    with pytest.raises(ValueError, match="num_samples=2"):
        pass_at_k(2, 1, 3)


class Engines:
    def generate(self, prompts, params, group_ids):
        self.params, self.group_ids = params, group_ids
        return [[None] * params.n for _ in prompts]


class Judge:
    def __init__(self, total: list[list[float]]) -> None:
        self.total = torch.tensor(total)

    def score(self, rows, groups):
        return Rewards(total=self.total, by_function={}, num_failed=0)


def test_sampled_answers_are_judged_by_the_rewards_and_those_without_one_are_not_right():
    evaluator = Evaluator(ROWS, GRPOConfig(num_eval_samples=4, max_tokens=7))
    engines = Engines()
    judge = Judge([[1.0, 0.0, 0.5, float("nan")], [0.0, 0.0, 0.0, 0.0]])
    metrics = evaluator.evaluate(engines, judge, lambda prompts, answers: 0.25)
    assert metrics == {
        "eval/expected_reward": 0.25,
        "eval/reward/mean": pytest.approx(1.5 / 7),
        "eval/pass@1": 0.125,
        "eval/pass@4": 0.5,
    }
    assert (engines.params.n, engines.params.max_tokens, engines.params.temperature) == (4, 7, 1.0)
    assert engines.group_ids == ["eval-prompt0", "eval-prompt1"]


def test_rows_without_a_known_answer_are_judged_by_samples_alone():
    rows = [{"prompt": "write a poem"}]
    evaluator = Evaluator(rows, GRPOConfig(num_eval_samples=1))
    metrics = evaluator.evaluate(Engines(), Judge([[1.0]]), lambda *arguments: pytest.fail("nothing is expected"))
    assert metrics == {"eval/reward/mean": 1.0, "eval/pass@1": 1.0}
    with pytest.raises(ValueError, match="`answer` or `right_completions`"):
        Evaluator(rows, GRPOConfig())
