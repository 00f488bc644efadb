"""verl rewards: runs a `compute_score` written for verl as a reward function of this trainer."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from trainers.reward_calls import RewardFunction

ComputeScore = Callable[..., float | Mapping[str, Any] | Awaitable[float | Mapping[str, Any]]]
"""compute_score(data_source, solution_str, ground_truth, extra_info=None) -> float, or a dict with "score"."""


def from_verl(compute_score: ComputeScore, *, data_source: str | None = None) -> RewardFunction:
    """A reward function that asks compute_score about each completion.

    The data set needs a column `data_source`, unless one is given here, and `ground_truth`, `answer` or verl's own
    `reward_model` (a dict with "ground_truth"); `extra_info` is handed on where it is there. The scores of a coroutine
    function are awaited together. A score of None masks the sample.
    """
    is_coroutine = inspect.iscoroutinefunction(compute_score) or inspect.iscoroutinefunction(
        type(compute_score).__call__
    )
    return (_AsyncVerlReward if is_coroutine else _VerlReward)(compute_score, data_source)


class _VerlReward:
    def __init__(self, compute_score: ComputeScore, data_source: str | None) -> None:
        self.compute_score, self.data_source = compute_score, data_source
        self.__name__ = getattr(compute_score, "__name__", type(compute_score).__name__)

    def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        return [_score(self.compute_score(**question)) for question in self.questions(completions, columns)]

    def questions(self, completions: Sequence[Any], columns: Mapping[str, Sequence[Any]]) -> list[dict[str, Any]]:
        """compute_score's arguments for each completion."""
        size = len(completions)
        sources = columns.get("data_source") if self.data_source is None else [self.data_source] * size
        if sources is None:
            raise ValueError(
                "compute_score needs the column `data_source`, or from_verl(data_source=...); "
                f"there are {sorted(columns)}"
            )
        return [
            {"data_source": source, "solution_str": _text(completion), "ground_truth": truth, "extra_info": extra_info}
            for completion, source, truth, extra_info in zip(
                completions, sources, _ground_truths(columns), columns.get("extra_info", [None] * size), strict=True
            )
        ]


class _AsyncVerlReward(_VerlReward):
    async def __call__(
        self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]
    ) -> list[float | None]:
        import asyncio

        questions = self.questions(completions, columns)
        return [_score(score) for score in await asyncio.gather(*(self.compute_score(**q) for q in questions))]


def _ground_truths(columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    for name in ("ground_truth", "answer"):
        if name in columns:
            return columns[name]
    if "reward_model" in columns:
        return [rule["ground_truth"] for rule in columns["reward_model"]]
    raise ValueError(
        f"compute_score needs the column `ground_truth`, `answer` or `reward_model`; there are {sorted(columns)}"
    )


def _score(result: float | Mapping[str, Any] | None) -> float | None:
    if isinstance(result, Mapping):
        if "score" not in result:
            raise ValueError(f'compute_score gave a dict with the keys {sorted(result)}, but no "score"')
        return result["score"]
    return result


def _text(completion: Any) -> str:
    return completion if isinstance(completion, str) else str(completion[-1]["content"])
