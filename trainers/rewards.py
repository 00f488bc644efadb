"""Rewards: runs reward functions over a batch of rollouts; what fails is masked and counted, never scored 0."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from rollout import Rollout

logger = logging.getLogger(__name__)

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""f(prompts, completions, **columns) -> a reward for each completion, None for one that can't be judged (as TRL's)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What the reward functions said about a batch of P groups of G samples."""

    total: torch.Tensor  # [P, G] float32, sum over the functions; NaN where a sample is masked
    by_function: dict[str, torch.Tensor]  # name -> [P, G] float32, NaN where that function gave nothing
    num_failed: int  # samples masked because a function raised, gave a wrong length, or something that is no number


def score(
    functions: Sequence[RewardFunction], rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Rollout]]
) -> Rewards:
    """Score groups[p], the samples of rows[p], with every function, and add the functions up.

    Each function is called once, with one entry per sample in every list: prompts, completions (text; for chat
    prompts a list with the assistant's message) and the rows' columns, of which it gets those that its signature
    takes. Coroutine functions run at the same time. Masked is every sample of a call that raises or returns the
    wrong number of rewards, and each one whose reward is None, NaN, infinite or no number.
    """
    shape = len(groups), len(groups[0])
    num_samples = shape[0] * shape[1]
    answers = _call_all(functions, _arguments(rows, groups))
    checked = [_checked(name, answer, num_samples) for name, answer in zip(function_names(functions), answers)]
    by_function = {
        name: torch.tensor(rewards, dtype=torch.float32).reshape(shape)
        for name, (rewards, _) in zip(function_names(functions), checked)
    }
    return Rewards(
        # NaN spreads through the sum: a sample that one function could not judge has no total.
        total=torch.stack(list(by_function.values())).sum(dim=0),
        by_function=by_function,
        num_failed=sum(any(failed) for failed in zip(*(failed for _, failed in checked))),
    )


def function_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The names under which functions appear in metrics; ValueError where there is none or two are the same."""
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    if not names:
        raise ValueError("no reward function given: pass at least one f(prompts, completions, **columns)")
    if len(set(names)) < len(names):
        raise ValueError(f"reward functions {names} must have different names: set __name__ on one of them")
    return names


def _arguments(rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Rollout]]) -> dict[str, list[Any]]:
    """One list per column, with one entry per sample; a column that a row lacks is None there."""
    samples = [(row, rollout) for row, group in zip(rows, groups, strict=True) for rollout in group]
    columns = dict.fromkeys(name for row in rows for name in row if name != "prompt")
    return {
        "prompts": [row["prompt"] for row, _ in samples],
        "completions": [_completion(row["prompt"], rollout) for row, rollout in samples],
        **{name: [row.get(name) for row, _ in samples] for name in columns},
    }


def _completion(prompt: Any, rollout: Rollout) -> str | list[dict[str, str]]:
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
    return [{"role": "assistant", "content": rollout.text}] if is_chat else rollout.text


def _call_all(functions: Sequence[RewardFunction], arguments: dict[str, list[Any]]) -> list[Any]:
    """Each function's answer, or the exception that it raised."""
    answers = [_call(function, arguments) for function in functions]
    pending = [i for i, answer in enumerate(answers) if inspect.isawaitable(answer)]
    if pending:
        # In a thread of its own, since the caller's thread (a notebook's) may already run an event loop.
        with ThreadPoolExecutor(max_workers=1) as executor:
            gathered = executor.submit(asyncio.run, _gather([answers[i] for i in pending])).result()
        for i, answer in zip(pending, gathered):
            answers[i] = answer
    return answers


async def _gather(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*awaitables, return_exceptions=True)


def _call(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    try:
        return function(**_accepted(function, arguments))
    except Exception as error:  # a user's function may raise anything; its samples are masked
        return error


def _accepted(function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _checked(name: str, answer: Any, num_samples: int) -> tuple[list[float], list[bool]]:
    """The rewards, NaN where there is none, and which samples failed (None is an answer, not a failure)."""
    if isinstance(answer, BaseException):
        logger.warning("reward function %s raised %r: %d samples masked", name, answer, num_samples)
        return [math.nan] * num_samples, [True] * num_samples
    values = answer.tolist() if hasattr(answer, "tolist") else answer  # NumPy arrays and tensors count as lists
    if not isinstance(values, list | tuple) or len(values) != num_samples:
        found = f"{len(values)} rewards" if isinstance(values, list | tuple) else type(answer).__name__
        logger.warning("reward function %s returned %s for %d samples: all masked", name, found, num_samples)
        return [math.nan] * num_samples, [True] * num_samples
    rewards = [_as_float(value) for value in values]
    failed = [value is not None and math.isnan(reward) for value, reward in zip(values, rewards)]
    if any(failed):
        logger.warning("reward function %s returned no finite number for %d samples: masked", name, sum(failed))
    return rewards, failed


def _as_float(value: Any) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError):
        return math.nan
    return reward if math.isfinite(reward) else math.nan
