"""Draining: a pool that is to end admits no new groups, lets the running ones end, and aborts what takes too long."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import queue
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError

from rollout.errors import EngineError, PoolDrainingError
from rollout.router import Router

if TYPE_CHECKING:
    from rollout.handle import PoolHandle

EXIT_TERMINATED = 143  # 128 + SIGTERM, as shells have it
DELIVERY_SECONDS = 10.0  # in which aborted groups are to be back at their callers
LOOK_SECONDS = 0.05

logger = logging.getLogger(__name__)


class Drain:
    """The coordinator's side; it does nothing until `run` is called, and is not taken back."""

    def __init__(self, router: Router, abort: Callable[[Sequence[str]], Awaitable[None]]) -> None:
        self._router, self._abort = router, abort
        self.is_on = False
        self._is_overdue = False

    def check_admits(self, group_ids: Sequence[str | None]) -> None:
        """PoolDrainingError unless these groups belong to a call that was there before, and there is time for them."""
        is_new = any(group_id is None or not self._router.is_running(group_id) for group_id in group_ids)
        if self.is_on and (is_new or self._is_overdue):
            raise PoolDrainingError("the pool is draining, so it takes no new groups: build another pool to go on")

    async def run(self, timeout: float) -> list[str]:
        """See `PoolHandle.drain`."""
        self.is_on = True
        await self._wait_while(lambda: self._router.num_groups, timeout)
        self._is_overdue = True
        aborted = self._router.placed_groups()
        with contextlib.suppress(TimeoutError):  # their callers may be gone
            async with asyncio.timeout(DELIVERY_SECONDS):
                while placed := self._router.placed_groups():
                    await self._abort(placed)  # again and again: one may be on its way from a lost engine to another
                    await self._wait_while(self._router.placed_groups, 1.0)
        return aborted

    async def _wait_while(self, has_some: Callable[[], Any], timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while has_some() and time.monotonic() < deadline:
            await asyncio.sleep(LOOK_SECONDS)


@dataclass(slots=True)
class SigtermDrain:
    """What `draining_on_sigterm` gives its block."""

    is_requested: bool = False  # SIGTERM has come


@contextmanager
def draining_on_sigterm(pool: PoolHandle, grace_seconds: float = 60.0) -> Iterator[SigtermDrain]:
    """While inside, SIGTERM drains the pool (`pool.drain(grace_seconds)`) beside the block, which goes on.

    The block gets the rollouts that it waits for. Its next call for others raises PoolDrainingError, which ends it; or
    it looks at `is_requested` and ends itself. It may still sync, collect and save. Then this raises SystemExit(143),
    so whatever is around it is left in good order. A second SIGTERM raises that at once.

    For the main thread, which alone may set signal handlers (ValueError elsewhere); the old handler comes back.
    """
    drain = SigtermDrain()
    orders: queue.SimpleQueue[bool] = queue.SimpleQueue()  # whose `put` is safe in a signal handler

    def on_sigterm(signum: int, frame: Any) -> None:
        if drain.is_requested:
            raise SystemExit(EXIT_TERMINATED)
        drain.is_requested = True
        orders.put(True)

    thread = threading.Thread(target=_drain_when_told, args=(pool, grace_seconds, orders), name="drain", daemon=True)
    previous = signal.signal(signal.SIGTERM, on_sigterm)
    thread.start()
    try:
        try:
            yield drain
        except PoolDrainingError:
            if not drain.is_requested:
                raise
        if drain.is_requested:
            thread.join()
            raise SystemExit(EXIT_TERMINATED)
    finally:
        orders.put(False)
        signal.signal(signal.SIGTERM, previous)


def _drain_when_told(pool: PoolHandle, grace_seconds: float, orders: queue.SimpleQueue[bool]) -> None:
    if not orders.get():
        return
    try:
        aborted = pool.drain(grace_seconds)
    except (EngineError, RayError) as error:  # the pool ended meanwhile
        logger.warning("the pool was not drained: %s", error)
    else:
        logger.info("the pool is drained; %d groups were aborted", len(aborted))
