"""Trace: spans of time on named lanes, written as a Chrome trace that ui.perfetto.dev or chrome://tracing shows."""

from __future__ import annotations

import json
import os
import threading
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

Lane = Literal["schedule", "execute", "sample"]

LANES: tuple[Lane, ...] = ("schedule", "execute", "sample")  # from top to bottom
MAX_SPANS = 200_000  # five for each step, and about 30 MB when written
_LANE_OF_PART: dict[str, Lane] = {"prepare": "schedule", "update": "schedule"}  # the others are lanes of their own


class Span(NamedTuple):
    """What happened on a lane between two readings of `time.monotonic`."""

    name: str
    lane: Lane
    start: float
    end: float
    args: Mapping[str, Any]


class Trace:
    """Records spans from any thread and keeps the last `max_spans` of them."""

    def __init__(self, max_spans: int = MAX_SPANS) -> None:
        self._spans: deque[Span] = deque(maxlen=max_spans)
        self._num_dropped = 0
        self._lock = threading.Lock()

    def add(self, name: str, start: float, end: float, args: Mapping[str, Any] | None = None) -> None:
        """A part of a step; its name says on which lane it is."""
        span = Span(name, _LANE_OF_PART.get(name, name), start, end, args or {})
        with self._lock:
            self._num_dropped += len(self._spans) == self._spans.maxlen
            self._spans.append(span)

    def spans(self) -> list[Span]:
        with self._lock:
            return list(self._spans)

    def write(self, path: str | Path) -> None:
        """Writes what was recorded so far; a file that is there is replaced as a whole."""
        path = Path(path)
        events = [_process_name(), *(_lane_name(lane) for lane in LANES), *map(_event, self.spans())]
        document = {
            "traceEvents": events,
            "displayTimeUnit": "ms",
            "otherData": {"num_dropped_spans": self._num_dropped},
        }
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        partial.write_text(json.dumps(document), encoding="utf-8")
        partial.replace(path)


def trace_file(trace_path: str | None) -> Path | None:
    """The file of `EngineConfig.trace_path`; {pid} in it is this process, so that engines of a pool write one each.

    Raises ValueError where its directory does not exist, since one learns it too late when the trace is written.
    """
    if trace_path is None:
        return None
    path = Path(trace_path.replace("{pid}", str(os.getpid()))).expanduser()
    if not path.parent.is_dir():
        raise ValueError(f"trace_path={trace_path!r}: there is no directory {str(path.parent)!r}. Make it first")
    return path


def _process_name() -> dict[str, Any]:
    return {"ph": "M", "name": "process_name", "pid": os.getpid(), "args": {"name": "engine"}}


def _lane_name(lane: Lane) -> dict[str, Any]:
    return {
        "ph": "M", "name": "thread_name", "pid": os.getpid(), "tid": LANES.index(lane), "args": {"name": lane},
    }  # fmt: skip


def _event(span: Span) -> dict[str, Any]:
    """A complete event; microseconds, on a clock that all processes of a machine share."""
    return {
        "ph": "X", "name": span.name, "cat": span.lane, "pid": os.getpid(), "tid": LANES.index(span.lane),
        "ts": span.start * 1e6, "dur": (span.end - span.start) * 1e6, "args": dict(span.args),
    }  # fmt: skip
