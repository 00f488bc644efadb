"""Engine loop: one thread that owns an engine, steps it, and runs everybody's commands between two steps."""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

from engine import Completion
from rollout.errors import EngineRetiredError, EngineStoppedError
from rollout.requests import GroupRequest, GroupResult, Partials

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
NAMED_GROUPS = 4  # of those open, in `Progress`


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """What the loop is at, for a watchdog."""

    phase: str  # "starting", "idle", "step", or the name of a command
    seconds: float  # since it entered the phase
    num_steps: int  # it has made so far
    num_groups: int  # that are open
    group_ids: tuple[str, ...]  # a few of them

    def __str__(self) -> str:
        groups = f"{self.num_groups} groups open"
        if self.group_ids:
            groups += f" ({', '.join(self.group_ids)}{', ...' if self.num_groups > len(self.group_ids) else ''})"
        return f"in phase {self.phase!r} for {self.seconds:.1f} s after {self.num_steps} steps, {groups}"


class _Command(NamedTuple):
    name: str
    run: Callable[[Any], Any]
    future: Future


@dataclass(slots=True)
class _OpenGroup:
    """A group whose samples are not all finished."""

    call_id: str
    num_samples: int
    completions: list[Completion] = field(default_factory=list)


@dataclass(slots=True)
class _Call:
    """What one caller's submissions have to show so far."""

    num_uncollected: int = 0
    finished: list[GroupResult] = field(default_factory=list)
    refusal: ValueError | None = None


class EngineLoop:
    """Thread-safe front of an engine. The engine is built, stepped and dropped on the loop's own thread."""

    def __init__(
        self,
        build_engine: Callable[[], Any],
        note_finished: Callable[[Sequence[Completion]], None] = lambda completions: None,
    ) -> None:
        """note_finished: is shown samples as they end, on the loop's thread."""
        self._build_engine, self._note_finished = build_engine, note_finished
        self._commands: queue.SimpleQueue[_Command] = queue.SimpleQueue()
        self._changed = threading.Condition()  # guards the fields below
        self._calls: dict[str, _Call] = {}
        self._failure: BaseException | None = None
        self._open_groups: dict[str, _OpenGroup] = {}  # changed by the loop's thread alone
        self._phase = ("starting", time.monotonic())
        self._num_steps = 0
        self._thread = threading.Thread(target=self._main, name="engine-loop", daemon=True)

    def start(self) -> None:
        """Builds the engine on the loop's thread; raises what building it raised."""
        started = self._enqueue("start", lambda engine: None)
        self._thread.start()
        started.result()

    def run(self, command: Callable[[Any], Result], name: str = "command") -> Result:
        """Result of `command(engine)`, run between two steps. Any error but ValueError also ends the loop."""
        return self._enqueue(name, command).result()

    def submit(self, call_id: str, requests: Sequence[GroupRequest]) -> None:
        """Queues the groups and returns at once; `collect(call_id)` has the results, or the engine's refusal."""
        with self._changed:
            self._check_alive()
            call = self._calls.setdefault(call_id, _Call())
            call.num_uncollected += len(requests)
            self._changed.notify_all()
        self._enqueue("submit", lambda engine: self._add(engine, call, call_id, requests))

    def collect(self, call_id: str, timeout: float) -> list[GroupResult]:
        """Groups of the call finished since the last collect; waits up to `timeout` seconds for the first.

        Raises ValueError if the engine refused the call, EngineStoppedError if the loop has ended.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._has_news(call_id), timeout)
            call = self._calls.get(call_id)
            if call is not None and call.refusal is not None:
                raise call.refusal
            if call is None or not call.finished:
                self._check_alive()
                return []
            return self._take_finished(call_id, call)

    def _has_news(self, call_id: str) -> bool:
        call = self._calls.get(call_id)
        return self._failure is not None or (call is not None and bool(call.finished or call.refusal))

    def _take_finished(self, call_id: str, call: _Call) -> list[GroupResult]:
        finished, call.finished = call.finished, []
        call.num_uncollected -= len(finished)
        if call.num_uncollected == 0:
            self._calls.pop(call_id, None)
        return finished

    def abort(self, group_ids: Sequence[str]) -> list[str]:
        """Ends the groups that run here with what they have; returns their ids, and those of groups that have ended."""

        def abort(engine: Any) -> list[str]:
            known = [name for name in group_ids if name in self._open_groups or self._is_uncollected(name)]
            self._end_groups(engine, known)
            return known

        return self.run(abort, "abort")

    def forget(self, call_id: str) -> None:
        """Drops a call: aborts its running groups and throws its results away."""
        self.run(lambda engine: self._forget(engine, call_id), "forget")

    def partials(self, engine: Any) -> Partials:
        """All that was drawn for groups that nobody has collected. For commands, which are given the engine."""
        partials = {group_id: list(group.completions) for group_id, group in self._open_groups.items()}
        for completion in engine.partial_completions():
            partials[completion.request_id].append(completion)
        with self._changed:
            for call in self._calls.values():
                partials |= {result.group_id: result.completions for result in call.finished}
        return {group_id: completions for group_id, completions in partials.items() if completions}

    def retire(self) -> Partials:
        """Stops for good and hands over what was drawn for groups that nobody has collected."""

        def hand_over(engine: Any) -> None:
            nonlocal partials
            partials = self.partials(engine)
            raise EngineRetiredError("it was told to retire")

        partials: Partials = {}
        try:
            self.run(hand_over, "retire")
        except EngineRetiredError:
            self._thread.join()
        return partials

    def progress(self) -> Progress:
        """Answered at once, whatever the loop is at."""
        phase, since = self._phase
        group_ids = tuple(self._open_groups.copy())
        return Progress(
            phase=phase,
            seconds=time.monotonic() - since,
            num_steps=self._num_steps,
            num_groups=len(group_ids),
            group_ids=group_ids[:NAMED_GROUPS],
        )

    def wait_until_stopped(self) -> None:
        """Returns never; raises EngineStoppedError, with its cause, once the loop has ended."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure is not None)
            self._check_alive()

    # --- the loop's own thread ---

    def _main(self) -> None:
        try:
            engine = self._build_engine()
            while True:
                self._run_commands(engine)
                if engine.can_step():
                    self._enter("step")
                    self._deliver(engine.step().finished)
                    self._num_steps += 1
        except BaseException as error:  # whatever it is, those who wait must hear of it
            self._end(error)

    def _enter(self, phase: str) -> None:
        self._phase = (phase, time.monotonic())

    def _run_commands(self, engine: Any) -> None:
        """Runs queued commands in order; waits for one while the engine has nothing to step."""
        must_wait = not engine.can_step()
        while True:
            if must_wait:
                self._enter("idle")
            try:
                command = self._commands.get(block=must_wait)
            except queue.Empty:
                return
            must_wait = False
            self._enter(command.name)
            self._run_command(engine, command)

    def _run_command(self, engine: Any, command: _Command) -> None:
        try:
            command.future.set_result(command.run(engine))
        except ValueError as refusal:  # the engine is as it was before
            logger.warning("%s refused: %s", command.name, refusal)
            command.future.set_exception(refusal)
        except BaseException as error:
            command.future.set_exception(error)
            raise

    def _add(self, engine: Any, call: _Call, call_id: str, requests: Sequence[GroupRequest]) -> None:
        for request in requests:
            try:
                self._add_group(engine, call_id, request)
            except ValueError as refusal:
                logger.warning("group refused: %s", refusal, extra={"group_id": request.group_id})
                with self._changed:
                    call.refusal = refusal
                    self._changed.notify_all()
                return

    def _add_group(self, engine: Any, call_id: str, request: GroupRequest) -> None:
        """Finished samples of a group that goes on from another engine are taken over as they are."""
        finished = [completion for completion in request.resume if completion.finish_reason != "abort"]
        group = _OpenGroup(call_id, request.params.n, finished)
        if len(finished) == request.params.n:
            self._finish(request.group_id, group)
            return
        engine.add_request(
            request.group_id, request.prompt_token_ids, request.params, resume=list(request.resume) or None
        )
        self._open_groups[request.group_id] = group

    def _deliver(self, completions: Sequence[Completion]) -> None:
        """Hands a group over once its last sample is finished."""
        self._note_finished(completions)
        for completion in completions:
            group = self._open_groups[completion.request_id]
            group.completions.append(completion)
            if len(group.completions) == group.num_samples:
                del self._open_groups[completion.request_id]
                self._finish(completion.request_id, group)

    def _is_uncollected(self, group_id: str) -> bool:
        """Whether the group has ended here and waits for its caller."""
        with self._changed:
            return any(result.group_id == group_id for call in self._calls.values() for result in call.finished)

    def _finish(self, group_id: str, group: _OpenGroup) -> None:
        completions = sorted(group.completions, key=lambda completion: completion.index)
        with self._changed:
            if group.call_id in self._calls:
                self._calls[group.call_id].finished.append(GroupResult(group_id=group_id, completions=completions))
                self._changed.notify_all()

    def _end_groups(self, engine: Any, group_ids: Sequence[str]) -> None:
        """Ends those that are open here."""
        running = [group_id for group_id in group_ids if group_id in self._open_groups]
        if running:
            self._deliver(engine.abort(running))

    def _forget(self, engine: Any, call_id: str) -> None:
        with self._changed:
            self._calls.pop(call_id, None)
        self._end_groups(engine, [name for name, group in self._open_groups.items() if group.call_id == call_id])

    def _end(self, failure: BaseException) -> None:
        """Marks the loop as ended and wakes everybody who waits for a result or a command."""
        with self._changed:
            self._failure = failure
            self._changed.notify_all()
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if not command.future.done():
                command.future.set_exception(failure)

    # --- callers' threads ---

    def _enqueue(self, name: str, command: Callable[[Any], Any]) -> Future:
        future: Future = Future()
        with self._changed:  # so that no command slips in after _end emptied the queue
            self._check_alive()
            self._commands.put(_Command(name, command, future))
        return future

    def _check_alive(self) -> None:
        if self._failure is not None:
            if isinstance(self._failure, EngineRetiredError):
                raise EngineRetiredError(str(self._failure))
            raise EngineStoppedError(f"{type(self._failure).__name__}: {self._failure}") from self._failure
