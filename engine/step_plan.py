"""The seams of a step: what the scheduler tells the model runner to do, and what comes back."""

from __future__ import annotations

from dataclasses import dataclass

from engine.outputs import TokenDetail
from engine.request import Request


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRequest:
    """One request's share of a step: positions [start, start + num_tokens)."""

    request: Request
    start: int  # first position computed; request.num_computed_tokens is already past the last one
    num_tokens: int
    samples: tuple[Request, ...]  # who draws from the last row: nobody, the request, or a leader and its siblings


@dataclass(slots=True, kw_only=True)
class SchedulerOutput:
    """The plan of one step."""

    scheduled: list[ScheduledRequest]
    block_copies: list[tuple[int, int]]  # (source, destination), made in this order before the step stores anything
    num_scheduled_tokens: int

    @property
    def is_empty(self) -> bool:
        return not self.scheduled


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRunnerOutput:
    """What the model runner drew: one entry for each of `scheduled[i].samples`, in order."""

    token_ids: list[int]
    logprobs: list[float]  # each exactly a float32
    policy_version: int  # of the weights at launch
    details: list[TokenDetail | None] | None = None  # None where no sample of the step has any
