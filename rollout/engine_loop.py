"""Engine loop: one thread that owns an engine, steps it, and runs everybody's commands between two steps."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from engine import Completion
from rollout.requests import GroupRequest, GroupResult

Result = TypeVar("Result")


class EngineStoppedError(RuntimeError):
    """The loop no longer steps its engine; the cause says why."""


@dataclass(slots=True)
class _OpenGroup:
    """A group whose samples are not all finished."""

    call_id: str
    num_samples: int
    completions: list[Completion] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """What one caller's submission has to show so far."""

    num_uncollected: int
    finished: list[GroupResult] = field(default_factory=list)
    refusal: ValueError | None = None


class EngineLoop:
    """Thread-safe front of an engine. The engine is built, stepped and dropped on the loop's own thread."""

    def __init__(self, build_engine: Callable[[], Any]) -> None:
        self._build_engine = build_engine
        self._commands: queue.SimpleQueue[tuple[Callable[[Any], Any], Future]] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the fields below
        self._calls: dict[str, _Call] = {}
        self._failure: BaseException | None = None
        self._open_groups: dict[str, _OpenGroup] = {}  # touched by the loop's thread alone
        self._thread = threading.Thread(target=self._main, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Builds the engine on the loop's thread; raises what building it raised."""
        started = self._enqueue(lambda engine: None)
        self._thread.start()
        started.result()

    def run(self, command: Callable[[Any], Result]) -> Result:
        """Result of `command(engine)`, run between two steps. Any error but ValueError also ends the loop."""
        return self._enqueue(command).result()

    def submit(self, call_id: str, requests: Sequence[GroupRequest]) -> None:
        """Queues the groups and returns at once; `collect(call_id)` has the results, or the engine's refusal."""
        self._check_alive()
        with self._changed:
            call = self._calls[call_id] = _Call(num_uncollected=len(requests))
        self._enqueue(lambda engine: self._add(engine, call, call_id, requests))

    def collect(self, call_id: str, timeout: float) -> list[GroupResult]:
        """Groups of the call finished since the last collect; waits up to `timeout` seconds for the first.

        Raises ValueError if the engine refused the call, EngineStoppedError if the loop has ended.
        """
        with self._changed:
            call = self._calls.get(call_id)
            if call is None:  # forgotten, or collected whole
                return []
            self._changed.wait_for(lambda: call.finished or call.refusal or self._failure, timeout)
            if call.refusal is not None:
                raise call.refusal
            if not call.finished:
                self._check_alive()
            return self._take_finished(call_id, call)

    def _take_finished(self, call_id: str, call: _Call) -> list[GroupResult]:
        finished, call.finished = call.finished, []
        call.num_uncollected -= len(finished)
        if call.num_uncollected == 0:
            self._calls.pop(call_id, None)
        return finished

    def abort(self, group_ids: Sequence[str]) -> list[str]:
        """Ends the groups that run here with what they have; returns their ids."""
        return self.run(lambda engine: self._abort(engine, group_ids))

    def forget(self, call_id: str) -> None:
        """Drops a call: aborts its running groups and throws its results away."""
        self.run(lambda engine: self._forget(engine, call_id))

    # --- the loop's own thread ---

    def _main(self) -> None:
        try:
            engine = self._build_engine()
            while True:
                self._run_commands(engine)
                if engine.can_step():
                    self._deliver(engine.step().finished)
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._end(error)

    def _run_commands(self, engine: Any) -> None:
        """Runs queued commands in order; waits for one while the engine has nothing to step."""
        must_wait = not engine.can_step()
        while True:
            try:
                command, future = self._commands.get(block=must_wait)
            except queue.Empty:
                return
            must_wait = False
            self._run_command(engine, command, future)

    def _run_command(self, engine: Any, command: Callable[[Any], Any], future: Future) -> None:
        try:
            future.set_result(command(engine))
        except ValueError as refusal:  # the engine is as it was before
            future.set_exception(refusal)
        except BaseException as error:
            future.set_exception(error)
            raise

    def _add(self, engine: Any, call: _Call, call_id: str, requests: Sequence[GroupRequest]) -> None:
        for request in requests:
            try:
                engine.add_request(request.group_id, request.prompt_token_ids, request.params)
            except ValueError as refusal:
                with self._changed:
                    call.refusal = refusal
                    self._changed.notify_all()
                return
            self._open_groups[request.group_id] = _OpenGroup(call_id, request.params.n)

    def _deliver(self, completions: Sequence[Completion]) -> None:
        """Hands a group over once its last sample is finished."""
        for completion in completions:
            group = self._open_groups[completion.request_id]
            group.completions.append(completion)
            if len(group.completions) == group.num_samples:
                del self._open_groups[completion.request_id]
                self._finish(completion.request_id, group)

    def _finish(self, group_id: str, group: _OpenGroup) -> None:
        completions = sorted(group.completions, key=lambda completion: completion.index)
        with self._changed:
            if group.call_id in self._calls:
                self._calls[group.call_id].finished.append(GroupResult(group_id=group_id, completions=completions))
                self._changed.notify_all()

    def _abort(self, engine: Any, group_ids: Sequence[str]) -> list[str]:
        running = [group_id for group_id in group_ids if group_id in self._open_groups]
        if running:
            self._deliver(engine.abort(running))
        return running

    def _forget(self, engine: Any, call_id: str) -> None:
        with self._changed:
            self._calls.pop(call_id, None)
        self._abort(engine, [group_id for group_id, group in self._open_groups.items() if group.call_id == call_id])

    def _end(self, failure: BaseException) -> None:
        """Marks the loop as ended and wakes everybody who waits for a result or a command."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        while True:
            try:
                _, future = self._commands.get_nowait()
            except queue.Empty:
                return
            if not future.done():
                future.set_exception(failure)

    # --- callers' threads ---

    def _enqueue(self, command: Callable[[Any], Any]) -> Future:
        future: Future = Future()
        with self._changed:  # so that no command slips in after _end emptied the queue
            self._check_alive()
            self._commands.put((command, future))
        return future

    def _check_alive(self) -> None:
        if self._failure is not None:
            raise EngineStoppedError(f"{type(self._failure).__name__}: {self._failure}") from self._failure
