"""Rewards: scores rollouts with reward functions; what fails or overruns is masked and counted, never scored 0."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import reduce
from itertools import chain
from typing import Any

import torch

from rollout import Rollout
from trainers.reward_calls import Answer, Call, RewardFunction, ask, function_names, settle
from trainers.reward_workers import RewardWorkers

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rewards:
    """What the reward functions said about P groups of G samples."""

    total: torch.Tensor  # [P, G] float32, sum over the functions; NaN where a sample is masked
    by_function: dict[str, torch.Tensor]  # name -> [P, G] float32, NaN where that function gave nothing
    num_failed: int  # samples masked because a function raised, died, gave a wrong length, or what is no number
    num_timed_out: int = 0  # samples masked because a function gave nothing before the deadline

    def joined(self, others: Rewards) -> Rewards:
        """These groups, then those of `others`, which have as many samples."""
        return Rewards(
            total=torch.cat([self.total, others.total]),
            by_function={name: torch.cat([ours, others.by_function[name]]) for name, ours in self.by_function.items()},
            num_failed=self.num_failed + others.num_failed,
            num_timed_out=self.num_timed_out + others.num_timed_out,
        )


class RewardScorer:
    """Scores groups of samples with reward functions, in processes of their own or, with num_processes=0, in this one.

    A function is called with the samples of one prompt: one entry per sample in every list, prompts, completions
    (text; for chat prompts a list with the assistant's message), completion_ids and the row's columns, of which it
    gets those that its signature takes. A call that raises, overruns `timeout` seconds, kills its process or gives
    a wrong number of rewards is made once more for each of its samples alone, so that the rest of the group keeps its
    rewards. Where a function compares the samples of a group, set `compares_samples = True` on it: it then never sees
    a part of one.

    In a process, a call that overruns is killed. In this process only coroutine functions can be ended, and only
    where they wait.
    """

    def __init__(self, functions: Sequence[RewardFunction], *, num_processes: int = 1, timeout: float = 30.0) -> None:
        if num_processes < 0 or timeout <= 0:
            raise ValueError(f"num_processes={num_processes} must not be negative, and timeout={timeout} be above 0")
        self.functions, self.names, self.timeout = list(functions), function_names(functions), timeout
        self._workers = RewardWorkers(self.functions, num_processes, timeout) if num_processes else None
        self._logged: set[tuple[str, str]] = set()

    def submit(self, row: Mapping[str, Any], group: Sequence[Rollout]) -> PendingRewards:
        """Begin to score the samples of one row; without processes, do it now."""
        arguments = _arguments(row, group)
        calls = [
            Call(
                function_index=i,
                arguments=arguments,
                is_divisible=not getattr(function, "compares_samples", False),
            )
            for i, function in enumerate(self.functions)
        ]
        if self._workers is not None:
            return PendingRewards(self, [self._workers.submit(call) for call in calls])
        futures: list[Future[Answer]] = [Future() for _ in calls]
        for future, answer in zip(futures, settle(calls, self._ask_here), strict=True):
            future.set_result(answer)
        return PendingRewards(self, futures)

    def score(self, rows: Sequence[Mapping[str, Any]], groups: Sequence[Sequence[Rollout]]) -> Rewards:
        """Score groups[p], the samples of rows[p], with every function, and add the functions up."""
        pending = [self.submit(row, group) for row, group in zip(rows, groups, strict=True)]
        return self.gather(pending)

    def gather(self, pending: Sequence[PendingRewards]) -> Rewards:
        """The rewards of several groups of equal size, in their order; waits for those that aren't there yet."""
        answers = [each.answers() for each in pending]  # [P][function]
        columns = list(zip(*answers, strict=True))
        by_function = {
            name: torch.tensor([answer.rewards for answer in column], dtype=torch.float32)
            for name, column in zip(self.names, columns, strict=True)
        }
        failures = [zip(*(answer.failures for answer in of_group)) for of_group in answers]
        of_samples = list(chain.from_iterable(failures))  # [P * G][function]
        return Rewards(
            # NaN spreads through the sum: a sample that one function could not judge has no total.
            total=reduce(torch.add, by_function.values()),
            by_function=by_function,
            num_failed=sum("failed" in of_sample for of_sample in of_samples),
            num_timed_out=sum("timed_out" in of_sample for of_sample in of_samples),
        )

    def close(self) -> None:
        if self._workers is not None:
            self._workers.close()

    def __enter__(self) -> RewardScorer:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def log_once(self, name: str, answer: Answer) -> None:
        """Each kind of failure of each function once, with its traceback; the metrics count the rest."""
        if answer.cause and (name, answer.cause) not in self._logged:
            self._logged.add((name, answer.cause))
            logger.warning("reward function %s: samples masked (%s): %s", name, answer.cause, answer.details.rstrip())

    def _ask_here(self, calls: Sequence[Call]) -> tuple[list[Answer], bool]:
        # The event loop gets a thread of its own, since the caller's (a notebook's) may already run one.
        with ThreadPoolExecutor(max_workers=1) as executor:
            return ask(self.functions, calls, self.timeout, lambda c: executor.submit(asyncio.run, c).result()), False


class PendingRewards:
    """The rewards of one group, some time."""

    def __init__(self, scorer: RewardScorer, futures: Sequence[Future[Answer]]) -> None:
        self._scorer, self._futures = scorer, futures

    def done(self) -> bool:
        return all(future.done() for future in self._futures)

    def result(self) -> Rewards:
        """Waits for the rewards, of shape [1, G]."""
        return self._scorer.gather([self])

    def answers(self) -> list[Answer]:
        """One per function, waited for."""
        answers = [future.result() for future in self._futures]
        for name, answer in zip(self._scorer.names, answers, strict=True):
            self._scorer.log_once(name, answer)
        return answers


def _arguments(row: Mapping[str, Any], group: Sequence[Rollout]) -> dict[str, list[Any]]:
    """One list per column, with one entry per sample."""
    prompt, size = row["prompt"], len(group)
    return {
        "prompts": [prompt] * size,
        "completions": [_completion(prompt, rollout) for rollout in group],
        "completion_ids": [list(rollout.token_ids) for rollout in group],
        **{name: [value] * size for name, value in row.items() if name != "prompt"},
    }


def _completion(prompt: Any, rollout: Rollout) -> str | list[dict[str, str]]:
    is_chat = isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], Mapping)
    return [{"role": "assistant", "content": rollout.text}] if is_chat else rollout.text
