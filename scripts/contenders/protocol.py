"""Protocol: how a benchmark and a program that it times talk: one JSON line each way. Standard library only."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from typing import Any


class Connection:
    """The program's end: takes requests from stdin and answers on what was stdout.

    Whatever libraries print goes to stderr from here on, so that it cannot get between the answers.
    """

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def answer(self, **facts: Any) -> None:
        self._answers.write(json.dumps(facts) + "\n")
        self._answers.flush()

    def next_request(self) -> dict[str, Any] | None:
        """Waits for the next request; None when there will be no more."""
        line = sys.stdin.readline()
        return json.loads(line) if line else None

    def serve(self, handle: Callable[..., dict[str, Any]]) -> None:
        """Says that it is ready, then answers every request with what `handle` returns for it."""
        self.answer(is_ready=True)
        while (request := self.next_request()) is not None:
            self.answer(**handle(**request))
