"""Rewards: how good a completion is, as functions `f(prompts, completions, **columns) -> list[float | None]`.

The signature is TRL's: one entry per sample in every list, the data set's columns as keyword arguments, and None for a
sample that can't be judged, which then takes no part in the step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from .data import SUMS, Row
from .math_equality import equals

RewardName = Literal["auto", "exact_match", "numeric", "math_verify", "task_score"]
RewardFunction = Callable[..., list[float | None]]

_NUMBER = re.compile(r"(?<!\d)[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?|(?<!\d)[-+]?\.\d+")
_TAGGED_ANSWER = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL)


def make_reward(name: RewardName, dataset: str, rows: Sequence[Row]) -> RewardFunction:
    """The named reward; "auto" chooses what fits the data. ValueError where the data can't serve it."""
    if name == "auto":
        name = "exact_match" if dataset == SUMS else "task_score" if _are_task_rows(rows) else "math_verify"
    if name == "task_score" and not _are_task_rows(rows):
        raise ValueError(f"reward 'task_score' needs a task of reasoning_gym as the dataset; {dataset!r} isn't one")
    functions = {"exact_match": exact_match, "numeric": numeric, "math_verify": math_verify, "task_score": task_score}
    if name not in functions:
        raise ValueError(f"reward={name!r} is unknown; choose one of {', '.join(get_args(RewardName))}")
    return functions[name]


def exact_match(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """1 where the completion is the answer, white space at both ends aside; else 0."""
    answers = _answers(columns)
    return [
        float(completion_text(completion).strip() == answer.strip())
        for completion, answer in zip(completions, answers, strict=True)
    ]


def numeric(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """1 where the last number of the completion equals the last number of the answer; None if the answer has none."""
    answers = _answers(columns)
    return [
        _numbers_agree(last_number(completion_text(completion)), last_number(answer))
        for completion, answer in zip(completions, answers, strict=True)
    ]


def math_verify(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """1 where math-verify finds completion and answer equal, else 0; None if the answer is empty.

    Nothing limits its time here: it is to run in a process that a deadline can end (trainers.RewardScorer).
    """
    answers = _answers(columns)
    grades = [equals(completion_text(text), answer) for text, answer in zip(completions, answers, strict=True)]
    return [None if grade is None else float(grade) for grade in grades]


def task_score(prompts: Sequence[Any], completions: Sequence[Any], **columns: Sequence[Any]) -> list[float | None]:
    """The score, 0 to 1, that the reasoning_gym task itself gives to the text in <answer> tags, or to all of it."""
    from reasoning_gym import get_score_answer_fn

    scorers = {name: get_score_answer_fn(name) for name in set(columns["task"])}
    rows = zip(prompts, completions, _answers(columns), columns["task"], columns["metadata"], strict=True)
    return [
        _score_or_none(
            scorers[task],
            tagged_answer(completion_text(completion)),
            {"question": _question(prompt), "answer": answer, "metadata": metadata},
        )
        for prompt, completion, answer, task, metadata in rows
    ]


def completion_text(completion: Any) -> str:
    """A completion is text, or chat messages of which the last one is the model's."""
    return completion if isinstance(completion, str) else str(completion[-1]["content"])


def last_number(text: str) -> float | None:
    """The last number in a text, thousands separators allowed."""
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None


def tagged_answer(text: str) -> str:
    """What stands between the last <answer> tags, or the whole text where there are none; stripped."""
    tagged = _TAGGED_ANSWER.findall(text)
    return tagged[-1] if tagged else text.strip()


def _answers(columns: dict[str, Sequence[Any]]) -> list[str]:
    answers = columns.get("answer", columns.get("ground_truth"))
    if answers is None:
        raise ValueError(f"the reward needs the column `answer` or `ground_truth`; there are {sorted(columns)}")
    return [str(answer) for answer in answers]


def _numbers_agree(found: float | None, right: float | None) -> float | None:
    if right is None:
        return None
    return float(found is not None and math.isclose(found, right, rel_tol=1e-6, abs_tol=1e-9))


def _score_or_none(scorer: Callable[..., float], answer: str, entry: Row) -> float | None:
    """A scorer that raises over one answer masks that sample and leaves the others their scores."""
    try:
        return float(scorer(answer=answer, entry=entry))
    except Exception:
        return None


def _question(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])


def _are_task_rows(rows: Sequence[Row]) -> bool:
    return bool(rows) and "task" in rows[0] and "metadata" in rows[0]
