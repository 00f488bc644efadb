"""Reward calls: asks reward functions about the samples of one prompt, and says of each sample what came back.

Both this process and those of RewardWorkers run it, so it imports neither torch nor Ray.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import traceback
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

RewardFunction = Callable[..., Sequence[float | None] | Awaitable[Sequence[float | None]]]
"""f(prompts, completions, **columns) -> a reward for each completion, None for one that can't be judged (as TRL's)."""

_NAMED = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY

Failure = Literal["failed", "timed_out"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Call:
    """One question: a function, by its place in the list of functions, and one list per argument."""

    function_index: int
    arguments: dict[str, list[Any]]
    is_divisible: bool = True  # not where the function compares the samples with one another

    @property
    def num_samples(self) -> int:
        return len(self.arguments["completions"])

    def split(self) -> list[Call]:
        """The same question about each sample alone."""
        if not self.is_divisible:
            return [self]
        columns = self.arguments.items()
        return [
            Call(function_index=self.function_index, arguments={name: [values[i]] for name, values in columns})
            for i in range(self.num_samples)
        ]


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What a function said about the samples of one call."""

    rewards: list[float]  # NaN where there is none
    failures: list[Failure | None]  # why there is none; None where the function itself said so, or gave a number
    is_lost: bool = False  # nothing came back: the function raised, hung, died or gave a wrong number of rewards
    cause: str = ""  # what went wrong, in a word or two
    details: str = ""  # the traceback, or what was found

    @classmethod
    def lost(cls, num_samples: int, failure: Failure, cause: str, details: str) -> Answer:
        rewards, failures = [math.nan] * num_samples, [failure] * num_samples
        return cls(rewards=rewards, failures=failures, is_lost=True, cause=cause, details=details)

    @classmethod
    def joined(cls, answers: Sequence[Answer]) -> Answer:
        """The answer about all the samples of several."""
        worst = next((answer for answer in answers if answer.cause), answers[0])
        return cls(
            rewards=[reward for answer in answers for reward in answer.rewards],
            failures=[failure for answer in answers for failure in answer.failures],
            cause=worst.cause,
            details=worst.details,
        )


AskTogether = Callable[[Sequence[Call]], tuple[list[Answer], bool]]


def ask(
    functions: Sequence[RewardFunction],
    calls: Sequence[Call],
    timeout: float,
    run: Callable[[Coroutine[Any, Any, list[Any]]], list[Any]],
) -> list[Answer]:
    """An answer to each call. Those of coroutine functions run at the same time, for at most `timeout` seconds each.

    run: runs a coroutine to its end in an event loop that isn't running yet.
    """
    results = [_result(functions[call.function_index], call.arguments) for call in calls]
    pending = [i for i, result in enumerate(results) if inspect.isawaitable(result)]
    if pending:
        gathered = run(_gather([results[i] for i in pending], timeout))
        for i, result in zip(pending, gathered):
            results[i] = result
    return [_answer(result, call.num_samples) for result, call in zip(results, calls)]


def settle(calls: Sequence[Call], ask_together: AskTogether) -> list[Answer]:
    """Answers to calls, in which no sample is lost through another: those of a lost call are asked about once more.

    ask_together: gives the answers, and whether one of the calls has taken the process, and so the others, along.
    """
    answers, is_process_lost = ask_together(calls)
    has_company = is_process_lost and len(calls) > 1
    parts = {
        i: call.split()
        for i, (call, answer) in enumerate(zip(calls, answers))
        if answer.is_lost and (has_company or len(call.split()) > 1)
    }
    singles = [single for call_parts in parts.values() for single in call_parts]
    if not singles:
        return answers
    retried, is_process_lost = ([], True) if is_process_lost else ask_together(singles)
    if is_process_lost:  # each alone, so that it can't harm another
        retried = [ask_together([single])[0][0] for single in singles]
    remaining = iter(retried)
    for i, call_parts in parts.items():
        answers[i] = Answer.joined([next(remaining) for _ in call_parts])
    return answers


def function_names(functions: Sequence[RewardFunction]) -> list[str]:
    """The names under which functions appear in metrics; ValueError where there is none or two are the same."""
    names = [getattr(function, "__name__", type(function).__name__) for function in functions]
    if not names:
        raise ValueError("no reward function given: pass at least one f(prompts, completions, **columns)")
    if len(set(names)) < len(names):
        raise ValueError(f"reward functions {names} must have different names: set __name__ on one of them")
    return names


def require_columns(functions: Sequence[RewardFunction], columns: Iterable[str]) -> None:
    """ValueError where a function has to have a parameter that the data set gives no value for."""
    given = {"prompts", "completions", "completion_ids", *columns}
    for function, name in zip(functions, function_names(functions)):
        needed = {
            parameter.name
            for parameter in inspect.signature(function).parameters.values()
            if parameter.default is parameter.empty and parameter.kind in _NAMED
        }
        if not needed <= given:
            raise ValueError(f"reward function {name} takes {sorted(needed - given)}; there are {sorted(given)}")


def is_coroutine_function(function: RewardFunction) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def _result(function: RewardFunction, arguments: dict[str, list[Any]]) -> Any:
    """What the function returns, or the exception that it raises."""
    try:
        return function(**_accepted(function, arguments))
    except (Exception, SystemExit) as error:  # a user's function may raise anything; its samples are masked
        return error


def _accepted(function: RewardFunction, arguments: dict[str, list[Any]]) -> dict[str, list[Any]]:
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


async def _gather(awaitables: Sequence[Awaitable[Any]], timeout: float) -> list[Any]:
    return await asyncio.gather(*(_awaited(awaitable, timeout) for awaitable in awaitables))


async def _awaited(awaitable: Awaitable[Any], timeout: float) -> Any:
    """What it gives or raises; _OutOfTime where the deadline passes first."""
    try:
        async with asyncio.timeout(timeout) as deadline:
            return await awaitable
    except (Exception, SystemExit) as error:
        return _OutOfTime(timeout) if deadline.expired() else error


class _OutOfTime(Exception):  # noqa: N818
    """The deadline's own; a TimeoutError may also be the function's, say from a socket."""


def _answer(result: Any, num_samples: int) -> Answer:
    if isinstance(result, _OutOfTime):
        return Answer.lost(num_samples, "timed_out", "time-out", f"no reward within {result.args[0]:g} s")
    if isinstance(result, BaseException):
        details = "".join(traceback.format_exception(result))
        return Answer.lost(num_samples, "failed", type(result).__name__, details)
    values = result.tolist() if hasattr(result, "tolist") else result  # NumPy arrays and tensors count as lists
    if not isinstance(values, list | tuple) or len(values) != num_samples:
        found = f"{len(values)} rewards" if isinstance(values, list | tuple) else type(result).__name__
        return Answer.lost(num_samples, "failed", "wrong result", f"{found} for {num_samples} samples")
    rewards = [_as_float(value) for value in values]
    has_failed = [value is not None and math.isnan(reward) for value, reward in zip(values, rewards)]
    bad = [value for value, is_bad in zip(values, has_failed) if is_bad]
    return Answer(
        rewards=rewards,
        failures=["failed" if is_bad else None for is_bad in has_failed],
        cause="wrong value" if bad else "",
        details=f"{bad[0]!r} is no finite number" if bad else "",
    )


def _as_float(value: Any) -> float:
    try:
        reward = float(value)
    except (TypeError, ValueError):
        return math.nan
    return reward if math.isfinite(reward) else math.nan
