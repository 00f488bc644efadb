"""Pipeline: steps under way, in order. While one runs on a thread of its own, the next is scheduled and packed."""

from __future__ import annotations

import sys
from collections import deque
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from engine.step_plan import ModelRunnerOutput, SchedulerOutput
from engine.timing import StepClock

SWITCH_SECONDS = 2e-4  # for which the thread that executes may have to wait for the interpreter


class Runner(Protocol):
    """What carries out plans: `engine.model_runner.ModelRunner`, or a stand-in for a device."""

    def prepare(self, plan: SchedulerOutput) -> Any:
        """The host's part of a step, before it runs; the step before may still be running meanwhile."""

    def execute(self, prepared: Any) -> ModelRunnerOutput:
        """Runs a prepared step. Steps are executed in the order in which they were prepared."""


class Pipeline:
    """Carries out plans one after another: depth 1 at once, on the caller's thread; depth 2 on another, one ahead.

    With depth 2 the process's threads take the interpreter from each other after 0.2 ms, not 5: else the device would
    stand still while a plan is made.
    """

    def __init__(self, runner: Runner, depth: int, clock: StepClock | None = None) -> None:
        if depth > 1:
            sys.setswitchinterval(min(sys.getswitchinterval(), SWITCH_SECONDS))
        self.runner, self.depth, self.clock = runner, depth, clock or StepClock()
        self._under_way: deque[tuple[SchedulerOutput, Future[ModelRunnerOutput]]] = deque()
        self._executor = ThreadPoolExecutor(1, thread_name_prefix="lockstep-execute") if depth > 1 else None
        self._has_failed = False

    def __len__(self) -> int:
        return len(self._under_way)

    @property
    def has_room(self) -> bool:
        return len(self._under_way) < self.depth

    def launch(self, plan: SchedulerOutput) -> None:
        """Prepares the plan and runs it after those under way."""
        with self.clock.part("prepare", plan):
            prepared = self.runner.prepare(plan)
        self._under_way.append((plan, self._submit(plan, prepared)))

    def take(self) -> tuple[SchedulerOutput, ModelRunnerOutput]:
        """Waits for the oldest step: its plan and what came out. What the step raised is raised here."""
        plan, future = self._under_way[0]
        output = future.result()
        self._under_way.popleft()
        return plan, output

    def clear(self) -> None:
        """Waits for the step that runs and drops it and all later ones."""
        self._has_failed = True
        wait([future for _, future in self._under_way])
        self._under_way.clear()
        self._has_failed = False

    def _submit(self, plan: SchedulerOutput, prepared: Any) -> Future[ModelRunnerOutput]:
        if self._executor is not None:
            return self._executor.submit(self._execute_after_others, plan, prepared)
        done: Future[ModelRunnerOutput] = Future()
        done.set_result(self._execute(plan, prepared))
        return done

    def _execute(self, plan: SchedulerOutput, prepared: Any) -> ModelRunnerOutput:
        with self.clock.part("execute", plan):
            return self.runner.execute(prepared)

    def _execute_after_others(self, plan: SchedulerOutput, prepared: Any) -> ModelRunnerOutput:
        """A step after one that failed would go on from tokens that do not exist."""
        if self._has_failed:
            raise CancelledError("an earlier step failed")
        try:
            return self._execute(plan, prepared)
        except BaseException:
            self._has_failed = True
            raise
