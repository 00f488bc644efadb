"""Report: what each section found, as a table on the terminal and as JSON that is whole after every section."""

from __future__ import annotations

import datetime
import json
import platform
import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]

Row = dict[str, Any]


@dataclass(slots=True)
class Report:
    """Rows by section, written to `output` whenever a section ends, however it ends."""

    output: Path
    limit_seconds: float
    facts: dict[str, Any] = field(default_factory=dict)
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds_left(self) -> float:
        return self.limit_seconds - (time.monotonic() - self.started)

    @property
    def has_failed(self) -> bool:
        return any(
            section["error"] is not None or any(row.get("passed") is False for row in section["rows"])
            for section in self.sections.values()
        )

    def say(self, text: str) -> None:
        print(f"[{time.monotonic() - self.started:6.1f} s] {text}", flush=True)

    def run(self, name: str, budget_seconds: float, section: Callable[[list[Row]], None]) -> None:
        """Runs a section, which appends its rows as it finds them; what it raises is noted and the next one runs."""
        rows: list[Row] = []
        result: dict[str, Any] = {"rows": rows, "error": None, "seconds": 0.0}
        self.sections[name] = result
        budget = min(budget_seconds, self.seconds_left)
        began = time.monotonic()
        self.say(f"{name} (at most {max(budget, 0):.0f} s)")
        try:
            if budget < 1:
                raise TimeoutError("no time was left for it")
            with time_limit(budget):
                section(rows)
        except Exception as error:
            result["error"] = "".join(traceback.format_exception(error)[-8:])
        result["seconds"] = round(time.monotonic() - began, 1)
        print(table(rows), flush=True)
        if result["error"] is not None:
            self.say(f"{name} ended with an error:\n{result['error']}")
        self.write()

    def write(self) -> None:
        content = {"benchmark": "gpu_check", **self.facts, "sections": self.sections}
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_text(json.dumps(content, indent=2, default=str) + "\n")


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises TimeoutError in the main thread once the time is over."""

    def stop(signum: int, frame: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def table(rows: Sequence[Row]) -> str:
    """Rows as text, one column for every key that some row has."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(key)) for key in columns] for row in rows)]
    widths = [max(len(line[at]) for line in cells) for at in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths)).rstrip() for line in cells)


def environment() -> dict[str, Any]:
    """When, on what, with which code."""
    import torch
    import triton

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": _git("rev-parse", "--short=12", "HEAD"),
        "has_local_changes": _git("status", "--porcelain", "--untracked-files=no") not in ("", "unknown"),
        "card": properties.name,
        "card_memory_gib": round(properties.total_memory / 2**30, 1),
        "capability": f"{properties.major}.{properties.minor}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
    }


def _git(*arguments: str) -> str:
    try:
        result = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return result.stdout.strip()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
