"""Progress: a bar on the terminal of a call that takes long, with the groups done and the tokens per second."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from types import TracebackType

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from rollout.rollout import Rollout


class GroupProgress:
    """A context manager; nothing is written where `console` is no terminal, and nothing if it is None.

    Its clock starts when it is entered. The last state of the bar stays on the screen.
    """

    def __init__(self, num_groups: int | None, console: Console | None) -> None:
        """num_groups: that will come; None where nobody knows."""
        self._num_groups = num_groups
        self._num_tokens = 0
        self._bar = _bar(console) if console is not None and console.is_terminal else None
        self._task: TaskID | None = None

    def note(self, group: Sequence[Rollout]) -> None:
        """A group is finished."""
        if self._bar is None or self._task is None:
            return
        self._num_tokens += sum(len(rollout.token_ids) for rollout in group)
        self._bar.update(self._task, advance=1, rate=self._tokens_per_second())

    def _tokens_per_second(self) -> str:
        assert self._bar is not None
        elapsed = self._bar.tasks[0].elapsed
        return f"{self._num_tokens / elapsed:,.0f} tokens/s" if elapsed else ""

    def __enter__(self) -> GroupProgress:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("groups", total=self._num_groups, rate="")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()


def stderr_console() -> Console:
    return Console(file=sys.stderr)


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
