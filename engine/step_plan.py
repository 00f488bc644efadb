"""The seams of a step: what the scheduler tells the model runner to do, and what comes back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from engine.outputs import TokenDetail
from engine.prompt_logprobs import ScoredRows
from engine.request import Request


class ScheduledRequest(NamedTuple):
    """One request's share of a step: positions [start, start + num_tokens).

    A named tuple, as a step makes one for every running request. Its request may move on while the step runs, so what
    the step needs is here.
    """

    request: Request
    start: int  # first position computed; request.num_computed_tokens is already past the last one
    num_tokens: int
    samples: tuple[Request, ...]  # who draws from the last row: nobody, the request, or a leader and its siblings
    source: int = -1  # where its only token is not known yet: place among the samples of the step before, that draws it
    num_steps: int = 1  # decode steps of the cycle in which it takes part

    @property
    def end(self) -> int:
        return self.start + self.num_tokens

    @property
    def completion_position(self) -> int:
        """Position in the completion of the token that its samples draw."""
        return self.start + self.num_tokens - self.request.num_prompt_tokens


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """The plan of one step, or of a cycle of several decode steps."""

    scheduled: list[ScheduledRequest]
    block_copies: list[tuple[int, int]]  # (source, destination), made in this order before the step stores anything
    num_scheduled_tokens: int
    num_steps: int = 1
    number: int = 0  # of its first step since the engine was built, from 1

    @property
    def sizes(self) -> dict[str, int]:
        """What a trace shows of the step."""
        return {
            "step": self.number,
            "num_requests": len(self.scheduled),
            "num_scheduled_tokens": self.num_scheduled_tokens,
        }

    @property
    def is_empty(self) -> bool:
        return not self.scheduled


def later_step(plan: SchedulerOutput, number: int) -> SchedulerOutput:
    """Step `number` of a cycle as a plan of its own, made from that of the step before."""
    going_on = [
        ScheduledRequest(entry.request, entry.start + 1, 1, entry.samples, place, entry.num_steps)
        for place, entry in enumerate(plan.scheduled)
        if entry.num_steps > number
    ]
    return SchedulerOutput(scheduled=going_on, block_copies=[], num_scheduled_tokens=len(going_on))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunnerOutput:
    """What the model runner drew: one entry for each of `scheduled[i].samples`, in order.

    Where the plan has several steps: those of the first step, then those of the entries that take part in the second,
    and so on.
    """

    token_ids: list[int]
    logprobs: list[float]  # each exactly a float32
    policy_version: int  # of the weights at launch
    details: list[TokenDetail | None] | None = None  # None where no sample of the step has any
    prompt_logprobs: Sequence[ScoredRows] = ()  # of requests that report on their prompts
