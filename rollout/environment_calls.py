"""Environment calls: runs a user's functions, sync or async, beside the caller, who waits no longer than a limit."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable
from concurrent.futures import Future
from types import TracebackType
from typing import Any

STOP_SECONDS = 1.0


class EnvironmentFailure(Exception):  # noqa: N818 (it is no error of ours: the sample is masked)
    """A user's function raised or ran out of time; the message says which and how."""


class EnvironmentCalls:
    """Use it as a context manager, and `call` in an event loop.

    A plain function runs on a daemon thread of its own; coroutine functions share one event loop on another thread, so
    that one which blocks cannot hold up the caller's. Whoever runs out of time is waited for no longer: a coroutine
    is cancelled, a thread, which Python cannot end, is left behind.
    """

    def __init__(self, timeout: float | None) -> None:
        self.timeout = timeout  # seconds of one call; None waits for ever
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run_loop, name="environments", daemon=True)

    def __enter__(self) -> EnvironmentCalls:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(STOP_SECONDS)

    def start(self, function: Callable[..., Any], *arguments: Any) -> Future:
        """Begins a call that nobody need wait for."""
        if inspect.iscoroutinefunction(function):
            return asyncio.run_coroutine_threadsafe(_awaited(function, arguments), self._loop)
        answer: Future = Future()
        threading.Thread(target=_run, args=(answer, function, arguments), name="environment", daemon=True).start()
        return answer

    async def call(self, name: str, function: Callable[..., Any], *arguments: Any) -> Any:
        """What the function returns; EnvironmentFailure, which says `name`, if it raises or takes too long."""
        answer = asyncio.wrap_future(self.start(function, *arguments))
        try:
            return await asyncio.wait_for(answer, self.timeout)
        except TimeoutError as error:
            if answer.done() and not answer.cancelled():  # the function's own
                raise EnvironmentFailure(f"{name} raised {error!r}") from error
            raise EnvironmentFailure(f"{name} took longer than {self.timeout} s") from None
        except asyncio.CancelledError:
            if asyncio.current_task().cancelling():  # the caller is
                raise
            raise EnvironmentFailure(f"{name} was cancelled") from None
        except Exception as error:  # a user's function may raise anything
            raise EnvironmentFailure(f"{name} raised {error!r}") from error

    def _run_loop(self) -> None:
        self._loop.run_forever()
        self._wait_a_moment()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._wait_a_moment()
        self._loop.close()

    def _wait_a_moment(self) -> None:
        """For tasks that nobody waits for; those that won't end are left behind."""
        left = asyncio.all_tasks(self._loop)
        if left:
            self._loop.run_until_complete(asyncio.wait(left, timeout=STOP_SECONDS / 4))


async def _awaited(function: Callable[..., Any], arguments: tuple[Any, ...]) -> Any:
    try:
        return await function(*arguments)
    except SystemExit as error:  # would end the loop of all the others
        raise RuntimeError(f"it called for an exit of the process: {error!r}") from error


def _run(answer: Future, function: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    if not answer.set_running_or_notify_cancel():
        return
    try:
        answer.set_result(function(*arguments))
    except SystemExit as error:
        answer.set_exception(RuntimeError(f"it called for an exit of the process: {error!r}"))
    except BaseException as error:  # whoever waits must hear of it
        answer.set_exception(error)
