"""Timing: how long a request waits, prefills and decodes, and where the seconds of the steps go.

Times are those of `time.monotonic`. One reading serves all requests of a step: none is taken for a token.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from time import monotonic
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from engine.outputs import Completion
    from engine.request import Request
    from engine.step_plan import SchedulerOutput
    from engine.trace import Trace

StepPart = Literal["schedule", "prepare", "execute", "sample", "update"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTiming:
    """The life of one sample on its engine, in seconds. A part that was never reached took none.

    A step under way holds a token back until it is taken in, so with asynchronous scheduling and in cycles of several
    steps these are the times at which tokens could be known, not those at which they were drawn.
    """

    queue: float  # from its arrival until it was first planned into a step
    prefill: float  # from there to its first token
    decode: float  # from there to its end: preemptions, pauses and weight updates are in it
    num_tokens: int  # drawn on this engine: those that it was resumed from are not

    @property
    def time_to_first_token(self) -> float | None:
        """None where no token was drawn."""
        return self.queue + self.prefill if self.num_tokens else None

    @property
    def mean_inter_token(self) -> float | None:
        """Seconds from one token to the next; None where there were not two."""
        return self.decode / (self.num_tokens - 1) if self.num_tokens > 1 else None

    @property
    def end_to_end(self) -> float:
        return self.queue + self.prefill + self.decode


@dataclass(slots=True)
class RequestStamps:
    """When things first happened to a request; None where they have not yet."""

    arrival: float = field(default_factory=monotonic)
    scheduled: float | None = None
    first_token: float | None = None
    num_resumed_tokens: int = 0  # that it had before its first token

    def note_first_token(self, time: float, num_output_tokens: int) -> None:
        self.first_token = time
        self.num_resumed_tokens = num_output_tokens - 1

    def timing(self, end: float, num_output_tokens: int) -> RequestTiming:
        """end: when the last token was taken in, or the request aborted."""
        scheduled = end if self.scheduled is None else self.scheduled
        first_token = end if self.first_token is None else self.first_token
        return RequestTiming(
            queue=scheduled - self.arrival,
            prefill=first_token - scheduled,
            decode=end - first_token,
            num_tokens=0 if self.first_token is None else num_output_tokens - self.num_resumed_tokens,
        )


def note_scheduled(request: Request, time: float) -> None:
    """A step has been planned in which the request, and the siblings that wait for it, take part."""
    for sample in (request, *request.siblings):
        if sample.stamps.scheduled is None:
            sample.stamps.scheduled = time


@dataclass(slots=True, kw_only=True)
class RequestTotals:
    """Sums over the samples that have ended: counters, so those of several engines may be added up.

    Seconds and tokens are of finished samples alone ("stop" and "length"): those of aborted ones say when the caller
    lost interest.
    """

    num_finished: int = 0
    num_aborted: int = 0
    num_tokens: int = 0
    queue_seconds: float = 0.0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0

    @property
    def mean_queue(self) -> float:
        return self.queue_seconds / max(self.num_finished, 1)

    @property
    def mean_time_to_first_token(self) -> float:
        return (self.queue_seconds + self.prefill_seconds) / max(self.num_finished, 1)

    @property
    def mean_inter_token(self) -> float:
        """Seconds from one token to the next, over all tokens but the first of each sample."""
        return self.decode_seconds / max(self.num_tokens - self.num_finished, 1)

    @property
    def mean_end_to_end(self) -> float:
        return (self.queue_seconds + self.prefill_seconds + self.decode_seconds) / max(self.num_finished, 1)

    def add(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            timing = completion.timing
            if completion.finish_reason == "abort" or timing is None:
                self.num_aborted += 1
                continue
            self.num_finished += 1
            self.num_tokens += timing.num_tokens
            self.queue_seconds += timing.queue
            self.prefill_seconds += timing.prefill
            self.decode_seconds += timing.decode

    def snapshot(self) -> RequestTotals:
        """A copy that stays as it is."""
        return replace(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepSeconds:
    """Seconds spent in each part of all steps so far. Steps may overlap: together they can exceed the time that passed.

    On a GPU, `sample` includes waiting for what was launched before it.
    """

    schedule: float = 0.0  # deciding what runs
    prepare: float = 0.0  # packing its inputs
    execute: float = 0.0  # running it, drawing included
    sample: float = 0.0  # of these, drawing
    update: float = 0.0  # taking in what was drawn


class StepClock:
    """Times the parts of steps: adds up their seconds and, where there is a trace, records a span of each.

    A part is timed by one thread at a time; different parts may be timed by different threads.
    """

    def __init__(self, trace: Trace | None = None) -> None:
        self.trace = trace
        self._seconds: dict[str, float] = {}

    def part(self, name: StepPart, plan: SchedulerOutput | None = None) -> TimedPart:
        """A context manager that times what runs inside it. plan: of the step, which may be set inside."""
        return TimedPart(self, name, plan)

    def seconds(self) -> StepSeconds:
        return StepSeconds(**self._seconds)

    def add(self, name: StepPart, start: float, end: float, plan: SchedulerOutput | None) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + end - start
        if self.trace is not None:
            self.trace.add(name, start, end, {} if plan is None else plan.sizes)


class TimedPart:
    """A part of a step that is being timed."""

    __slots__ = ("clock", "name", "plan", "start")

    def __init__(self, clock: StepClock, name: StepPart, plan: SchedulerOutput | None) -> None:
        self.clock, self.name, self.plan = clock, name, plan

    def __enter__(self) -> TimedPart:
        self.start = monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        self.clock.add(self.name, self.start, monotonic(), self.plan)
