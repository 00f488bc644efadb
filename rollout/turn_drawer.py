"""Turn drawer: has a pool draw single turns of many episodes, those that are asked for together in one submission."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from engine import SamplingParams
from rollout.errors import EngineError
from rollout.handle import PoolHandle
from rollout.rollout import Rollout
from rollout.stream import RolloutStream

# Submissions that are waited for at a time, each by a thread. While all of them wait, turns gather for the next one.
MAX_SUBMISSIONS = 32
STOP_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _PendingTurn:
    group_id: str
    prompt_token_ids: list[int]
    params: SamplingParams
    drawn: asyncio.Future[Rollout]

    def resolve(self, rollout: Rollout) -> None:
        if not self.drawn.done():
            self.drawn.set_result(rollout)

    def fail(self, error: BaseException) -> None:
        if not self.drawn.done():
            self.drawn.set_exception(error)
            self.drawn.exception()  # counts as seen, also where the task that waits is being cancelled


class TurnDrawer:
    """Belongs to one event loop. Which turns travel together changes only when they are drawn, never what."""

    def __init__(self, pool: PoolHandle) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._waiting: list[_PendingTurn] = []
        self._running: dict[str, _PendingTurn] = {}
        self._threads: set[threading.Thread] = set()
        self._is_submitting = False
        self._is_closed = False

    async def draw(self, group_id: str, prompt_token_ids: list[int], params: SamplingParams) -> Rollout:
        """The one sample of a prompt; raises what the pool raises."""
        turn = _PendingTurn(
            group_id=group_id, prompt_token_ids=prompt_token_ids, params=params, drawn=self._loop.create_future()
        )
        self._waiting.append(turn)
        self._loop.call_soon(self._submit)  # after whoever else asks in this round of the loop
        return await turn.drawn

    def close(self) -> None:
        """Aborts what still runs, and waits a moment for the threads."""
        self._is_closed = True
        self._waiting.clear()
        for group_id in list(self._running):
            with contextlib.suppress(ValueError, EngineError):  # finished a moment ago, or with its engine
                self._pool.abort([group_id])
        deadline = time.monotonic() + STOP_SECONDS
        for thread in list(self._threads):
            thread.join(max(0.0, deadline - time.monotonic()))

    def _submit(self) -> None:
        if not self._waiting or self._is_submitting or len(self._threads) >= MAX_SUBMISSIONS:
            return
        turns, self._waiting = self._waiting, []
        self._running.update({turn.group_id: turn for turn in turns})
        self._is_submitting = True
        thread = threading.Thread(target=self._stream, args=(turns,), name="turns", daemon=True)
        self._threads.add(thread)
        thread.start()

    def _stream(self, turns: Sequence[_PendingTurn]) -> None:
        """On a thread of its own: submits, and hands on what comes as it comes."""
        error: BaseException | None = None
        try:
            with contextlib.closing(self._open_stream(turns)) as stream:
                if not self._is_closed:  # else its groups were not to be found yet when the others were aborted
                    for [rollout] in stream:
                        self._notify(self._take, rollout)
        except BaseException as raised:  # whoever waits must hear of it
            error = raised
        self._notify(self._ended, threading.current_thread(), turns, error)

    def _open_stream(self, turns: Sequence[_PendingTurn]) -> RolloutStream:
        try:
            return self._pool.stream(
                [turn.prompt_token_ids for turn in turns],
                [turn.params for turn in turns],
                group_ids=[turn.group_id for turn in turns],
            )
        finally:
            self._notify(self._submitted)

    def _notify(self, function: Callable[..., None], *arguments: Any) -> None:
        with contextlib.suppress(RuntimeError):  # the loop was closed: nobody waits any more
            self._loop.call_soon_threadsafe(function, *arguments)

    def _submitted(self) -> None:
        self._is_submitting = False
        self._submit()

    def _take(self, rollout: Rollout) -> None:
        self._running.pop(rollout.group_id).resolve(rollout)

    def _ended(self, thread: threading.Thread, turns: Sequence[_PendingTurn], error: BaseException | None) -> None:
        self._threads.discard(thread)
        for turn in turns:
            self._running.pop(turn.group_id, None)
            turn.fail(error or EngineError(f"the pool gave no answer for {turn.group_id!r}"))
        self._submit()
