"""RolloutStream: the groups of one submission, in the order in which they finish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator

from rollout.progress import GroupProgress
from rollout.rollout import Rollout
from rollout.submission import Submission

_END = object()


class RolloutStream:
    """Iterates over finished groups (lists of Rollout, by sample index), with `for` or `async for`.

    Leaving it early (break, an error, a timeout) aborts the groups that are still running.
    """

    def __init__(
        self,
        submission: Submission,
        timeout: float | None,
        note_delivered: Callable[[list[Rollout]], None],
        progress: GroupProgress,
    ) -> None:
        """timeout: seconds for all groups. note_delivered, progress: see a group just before the caller does."""
        # neither refers back to the stream, so that dropping it aborts at once and not at some garbage collection
        self._submission = submission
        self._arrivals = _arrivals(submission, timeout, note_delivered, progress)

    def __iter__(self) -> Iterator[list[Rollout]]:
        return self

    def __next__(self) -> list[Rollout]:
        return next(self._arrivals)[1]

    def __aiter__(self) -> AsyncIterator[list[Rollout]]:
        return self

    async def __anext__(self) -> list[Rollout]:
        arrival = await asyncio.to_thread(next, self._arrivals, _END)
        if arrival is _END:
            raise StopAsyncIteration
        return arrival[1]

    def in_prompt_order(self) -> list[list[Rollout]]:
        """Waits for all groups."""
        return [group for _, group in sorted(self._arrivals, key=lambda arrival: arrival[0])]

    def close(self) -> None:
        """Aborts what is still running."""
        self._arrivals.close()
        self._submission.give_up()

    def __del__(self) -> None:
        self._submission.give_up()


def _arrivals(
    submission: Submission,
    timeout: float | None,
    note_delivered: Callable[[list[Rollout]], None],
    progress: GroupProgress,
) -> Iterator[tuple[int, list[Rollout]]]:
    """(place of the prompt, its rollouts) as groups finish."""
    deadline = None if timeout is None else time.monotonic() + timeout
    num_arrived = 0
    try:
        with progress:
            submission.fill()
            while len(submission):
                arrived = submission.take(None if deadline is None else max(0.0, deadline - time.monotonic()))
                if not arrived and deadline is not None and time.monotonic() >= deadline:
                    raise TimeoutError(_describe_wait(submission, num_arrived, timeout))
                num_arrived += len(arrived)
                for group, result in arrived:
                    rollouts = group.rollouts(result)
                    note_delivered(rollouts)
                    progress.note(rollouts)
                    yield group.position, rollouts
                submission.fill()
            submission.check_complete()
    finally:
        submission.give_up()


def _describe_wait(submission: Submission, num_arrived: int, timeout: float | None) -> str:
    waits = [f"engine {i}: {num_groups} groups" for i, num_groups in submission.num_groups_by_engine().items()]
    return (
        f"{len(submission)} of {len(submission) + num_arrived} groups are unfinished after {timeout} s "
        f"({', '.join(waits)}) and are aborted: raise timeout, or lower max_tokens"
    )
