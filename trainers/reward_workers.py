"""Reward workers: processes that run reward functions, and that a deadline, a crash or a leak can end without harm.

Not multiprocessing's spawn, which runs the caller's script again and asks for a main guard, nor fork, which copies
locks that Ray's threads hold. Not pebble's ProcessPool either, which kills what overruns but shares one pipe between
its workers: one that dies idle, or before it has said what it took, breaks the pool.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing import Pipe

from ray import cloudpickle

from trainers.reward_calls import Answer, Call, RewardFunction, function_names, is_coroutine_function, settle

START_SECONDS = 120.0  # a process imports the functions' modules first; that isn't charged to a call
GRACE_SECONDS = 1.0  # coroutines that run out of time are cancelled inside the process; only then is it killed

_CLOSED = "the reward processes were closed before the call had an answer"
_PROGRAM = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[2]); "
    "from trainers.reward_process import serve; serve(int(sys.argv[1]))"
)


class RewardWorkers:
    """A pool of processes. Each has a thread here, which takes calls from one queue and watches over the deadline."""

    def __init__(self, functions: Sequence[RewardFunction], num_processes: int, timeout: float) -> None:
        """timeout: seconds that a call may take. ValueError where a function can't be pickled. The processes start at
        once, and need not be waited for."""
        self.functions, self.timeout = _pickled(functions), timeout
        self.is_concurrent = [is_coroutine_function(function) for function in functions]
        self.is_closed = False
        self._queue: deque[_Entry] = deque()
        self._condition = threading.Condition()
        self._workers = [_Worker(self, name=f"reward-worker-{i}") for i in range(num_processes)]
        for worker in self._workers:
            worker.thread.start()

    def submit(self, call: Call) -> Future[Answer]:
        entry = _Entry(call=call, is_concurrent=self.is_concurrent[call.function_index])
        with self._condition:
            if self.is_closed:
                raise RuntimeError(_CLOSED)
            self._queue.append(entry)
            self._condition.notify()
        return entry.future

    def take(self) -> list[_Entry]:
        """The next call, with all others that can run beside it in one event loop; none once the pool is closed."""
        with self._condition:
            while True:
                self._condition.wait_for(lambda: self._queue or self.is_closed)
                if self.is_closed:
                    return []
                taken = [self._queue.popleft()]
                if taken[0].is_concurrent:
                    taken += [entry for entry in self._queue if entry.is_concurrent]
                    self._queue = deque(entry for entry in self._queue if not entry.is_concurrent)
                if taken := [entry for entry in taken if entry.future.set_running_or_notify_cancel()]:
                    return taken

    def close(self) -> None:
        """Kills the processes, whatever they are doing. Calls without an answer end in an exception."""
        with self._condition:
            self.is_closed = True
            for entry in self._queue:
                entry.future.cancel()
            self._queue.clear()
            self._condition.notify_all()
        for worker in self._workers:
            worker.kill()
        for worker in self._workers:
            worker.thread.join()


@dataclass(frozen=True, slots=True, kw_only=True)
class _Entry:
    call: Call
    is_concurrent: bool
    future: Future[Answer] = field(default_factory=Future)


class _Worker:
    """The thread that owns one process: starts it, asks it, and replaces it when it overran or died.

    It starts the process itself, since Linux ends a process with the thread that asked to be outlived by none.
    """

    def __init__(self, pool: RewardWorkers, name: str) -> None:
        self.thread = threading.Thread(target=self.run, name=name, daemon=True)
        self.pool = pool
        self.process: _Process | None = None
        self.lock = threading.Lock()  # over self.process: close() kills from another thread

    def run(self) -> None:
        with suppress(RuntimeError, OSError):  # the first call tries again, and says why it fails
            self._ready_process()
        while entries := self.pool.take():
            try:
                answers = settle([entry.call for entry in entries], self._ask_together)
            except Exception as error:
                for entry in entries:
                    entry.future.set_exception(error)
            else:
                for entry, answer in zip(entries, answers, strict=True):
                    entry.future.set_result(answer)
        self._end_process()

    def kill(self) -> None:
        with self.lock:
            if self.process is not None:
                self.process.kill()

    def _ask_together(self, calls: Sequence[Call]) -> tuple[list[Answer], bool]:
        request = _pickled_request(calls, self.pool.timeout)
        is_concurrent = any(self.pool.is_concurrent[call.function_index] for call in calls)
        process = self._ready_process()
        try:
            return process.ask(request, self.pool.timeout + (GRACE_SECONDS if is_concurrent else 0.0)), False
        except TimeoutError:
            self._end_process()
            loss = ("timed_out", "time-out", f"no reward within {self.pool.timeout:g} s; its process was killed")
        except (EOFError, OSError):
            loss = ("failed", "death", f"its process died with exit code {self._end_process()}")
        if self.pool.is_closed:
            raise RuntimeError(_CLOSED)
        return [Answer.lost(call.num_samples, *loss) for call in calls], True

    def _ready_process(self) -> _Process:
        """The process, ready for a call; RuntimeError where it can't be made so, or the pool has been closed."""
        if self.process is not None and self.process.has_ended():
            self._end_process()
        with self.lock:
            if self.pool.is_closed:
                raise RuntimeError(_CLOSED)
            self.process = self.process or _Process()
        try:
            self.process.load(self.pool.functions)
        except RuntimeError:
            self._end_process()
            raise
        return self.process

    def _end_process(self) -> int | None:
        """Returns the exit code; negative is the signal that ended it."""
        with self.lock:
            process, self.process = self.process, None
            return process.end() if process is not None else None


class _Process:
    """A process that runs reward_process.serve, in a group of its own with all programs that a reward may start."""

    def __init__(self) -> None:
        self.is_loaded = False
        self.connection, childs_end = Pipe()
        with childs_end:
            descriptor = childs_end.fileno()
            self.popen = subprocess.Popen(
                [sys.executable, "-c", _PROGRAM, str(descriptor), json.dumps([str(path) for path in sys.path])],
                stdin=subprocess.DEVNULL,
                pass_fds=[descriptor],
                process_group=0,
            )

    def load(self, functions: bytes) -> None:
        """Waits until the functions are loaded; RuntimeError says why they can't be."""
        if self.is_loaded:
            return
        try:
            self.connection.send_bytes(functions)
            problem = self.connection.recv() if self.connection.poll(START_SECONDS) else f"not in {START_SECONDS:.0f} s"
        except (EOFError, OSError):
            problem = "it died while it started"
        if problem:
            raise RuntimeError(
                f"a reward process could not load the reward functions; importable modules help, and "
                f"reward_processes=0 runs them in this process:\n{problem}"
            )
        self.is_loaded = True

    def ask(self, request: bytes, seconds: float) -> list[Answer]:
        """TimeoutError when the seconds pass, EOFError or OSError where the process dies."""
        self.connection.send_bytes(request)
        if not self.connection.poll(seconds):
            raise TimeoutError
        answers = self.connection.recv()
        if isinstance(answers, str):
            raise RuntimeError(f"a reward process could not read the samples' columns:\n{answers}")
        return answers

    def has_ended(self) -> bool:
        return self.connection.poll(0)  # between calls nothing comes but the end of the stream

    def kill(self) -> None:
        if self.popen.returncode is None:  # once it has been waited for, its number may be another's
            with suppress(ProcessLookupError):
                os.killpg(self.popen.pid, signal.SIGKILL)

    def end(self) -> int:
        if self.connection.closed:
            return self.popen.returncode
        self.kill()
        self.connection.close()
        return self.popen.wait()


def _pickled_request(calls: Sequence[Call], timeout: float) -> bytes:
    try:
        return cloudpickle.dumps((list(calls), timeout))
    except Exception as error:
        raise ValueError(
            f"the columns {sorted(calls[0].arguments)} of a row can't be sent to a reward process ({error}); give rows "
            "plain values, or set reward_processes=0"
        ) from error


def _pickled(functions: Sequence[RewardFunction]) -> bytes:
    try:
        # Lambdas, closures and what __main__ defines travel whole; what can be imported travels by name.
        return cloudpickle.dumps(list(functions))
    except Exception as error:
        raise ValueError(
            f"reward functions {function_names(functions)} can't be sent to processes of their own ({error}); make "
            "what they hold (locks, clients, open files) on the first call, or set reward_processes=0"
        ) from error
