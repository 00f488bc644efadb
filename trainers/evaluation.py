"""Evaluation: how good a policy is on held-out prompts - exact probabilities of right answers, pass@k by samples."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import comb
from typing import Any

from rollout import PoolHandle, SamplingParams
from trainers.loop_config import LoopConfig
from trainers.rewards import RewardScorer

ExpectedReward = Callable[[Sequence[Any], Sequence[str | Sequence[str]]], float]
"""(prompts, right completions) -> the probability of a right one, averaged."""


class Evaluator:
    """Measures on the same rows each time, and with the same random numbers.

    rows: with an `answer` (see answer_template) or `right_completions`; where samples alone are to be judged, by the
    run's reward functions, they need neither.
    """

    def __init__(self, rows: Sequence[Mapping[str, Any]], config: LoopConfig) -> None:
        self.rows, self.config = list(rows), config
        is_needed = not config.num_eval_samples
        completions = [_right_completions(row, config.answer_template, is_needed) for row in self.rows]
        self.right_completions = completions if all(one is not None for one in completions) else None

    def evaluate(self, pool: PoolHandle, scorer: RewardScorer, expected_reward: ExpectedReward) -> dict[str, float]:
        """eval/expected_reward, and with num_eval_samples eval/reward/mean, eval/pass@1 and eval/pass@{n}."""
        metrics: dict[str, float] = {}
        if self.right_completions is not None:
            prompts = [row["prompt"] for row in self.rows]
            metrics["eval/expected_reward"] = expected_reward(prompts, self.right_completions)
        if self.config.num_eval_samples:
            metrics |= self._sampled(pool, scorer)
        return metrics

    def _sampled(self, pool: PoolHandle, scorer: RewardScorer) -> dict[str, float]:
        config, n = self.config, self.config.num_eval_samples
        params = SamplingParams(n=n, temperature=config.temperature, max_tokens=config.max_tokens, stop=config.stop)
        group_ids = [f"eval-prompt{p}" for p in range(len(self.rows))]
        groups = pool.generate([row["prompt"] for row in self.rows], params, group_ids=group_ids)
        total = scorer.score(self.rows, groups).total
        metrics = {} if total.isnan().all() else {"eval/reward/mean": total.nanmean().item()}
        num_right = (total >= config.right_reward).sum(dim=1).tolist()  # a sample without a reward is not right
        for k in sorted({1, n}):
            metrics[f"eval/pass@{k}"] = sum(pass_at_k(n, right, k) for right in num_right) / len(num_right)
        return metrics


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The unbiased estimate of the probability that one of k samples is right: 1 - C(n - c, k) / C(n, k).

    "Evaluating Large Language Models Trained on Code", arXiv 2107.03374, equation 1.
    """
    if not (0 <= num_right <= num_samples and 1 <= k <= num_samples):
        raise ValueError(f"{num_right=} and {k=} must be at most num_samples={num_samples}, and k at least 1")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def _right_completions(row: Mapping[str, Any], answer_template: str, is_needed: bool) -> str | Sequence[str] | None:
    if "right_completions" in row:
        return row["right_completions"]
    if "answer" in row:
        return answer_template.format(answer=row["answer"])
    if is_needed:
        raise ValueError(f"an evaluation row needs `answer` or `right_completions`; it has {sorted(row)}")
    return None
