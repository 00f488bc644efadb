"""Timing: runs the contenders of a benchmark in turns, each in a process of its own, and reports what they took."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
CONTENDERS = ROOT / "scripts" / "contenders"
EXIT_SECONDS = 60
NUM_LOG_LINES = 12


class Contender:
    """A program of scripts/contenders in its own process: loaded once, then asked again and again (see protocol.py)."""

    def __init__(
        self, name: str, script: str, *arguments: str, python: str = sys.executable, is_ours: bool = False
    ) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (closed with the program)
        self._process = subprocess.Popen(
            [python, str(CONTENDERS / script), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=_environment(is_ours),
            text=True,
        )

    def wait_until_ready(self) -> None:
        self._read()

    def ask(self, **request: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """Ends the program: politely, by the end of its requests, then less so."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if line:
            return json.loads(line)
        self._log.seek(0)
        log = self._log.read().decode(errors="replace").splitlines()[-NUM_LOG_LINES:]
        raise RuntimeError(f"{self.name} ended with exit code {self._process.wait()}:\n" + "\n".join(log))


@contextlib.contextmanager
def started(contenders: Sequence[Contender], console: Console) -> Iterator[None]:
    """Waits until all contenders have loaded; ends them afterwards."""
    try:
        for contender in contenders:
            console.print(f"loading {contender.name}", style="dim")
            contender.wait_until_ready()
        yield
    finally:
        for contender in contenders:
            contender.close()


@contextlib.contextmanager
def busy_process(is_wanted: bool = True) -> Iterator[None]:
    """Something else that wants a core all the time, as on most machines."""
    if not is_wanted:
        yield
        return
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def read_bandwidth(seconds: float = 1.0) -> float:
    """Bytes per second at which torch adds up a tensor that no cache holds, with the threads it has."""
    import torch

    data = torch.ones(2**26)
    return data.nbytes / min(call_seconds(data.sum, seconds))


def call_seconds(call: Callable[[], object], seconds: float) -> list[float]:
    """What each call took of those that fit into `seconds`, at least three after one that does not count."""
    call()
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return times


def model_directory(model: str) -> str:
    """Where contenders find the model in Hugging Face format; a GGUF file is converted first."""
    from engine.checkpoint import resolve_model

    return str(resolve_model(model))


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> list[float]:
    """Ours over theirs, turn by turn: neighbours in time share the machine's state."""
    return [a / b for a, b in zip(ours, theirs, strict=True)]


def results_table(
    title: str, unit: str, results: Mapping[str, Sequence[float]], ours: Sequence[str], digits: int
) -> Table:
    """A row for each contender; the last columns are what each of ours takes, or gives, in the same turns, over it."""
    table = Table("", f"{unit}, min", "median", "max", *(f"{name} /" for name in ours), title=title, box=SIMPLE_HEAD)
    for name, values in results.items():
        relative = [f"{statistics.median(ratios(results[one], values)):.2f}" if one != name else "" for one in ours]
        figures = [f"{figure:.{digits}f}" for figure in (min(values), statistics.median(values), max(values))]
        table.add_row(name, *figures, *relative)
    return table


def summary(results: Mapping[str, Sequence[float]], ours: Sequence[str]) -> dict[str, Any]:
    """The same for a file: every value, in order, and each of ours over it."""
    return {
        name: {
            "values": list(values),
            "median": statistics.median(values),
            "relative_to_it": {one: ratios(results[one], values) for one in ours if one != name},
        }
        for name, values in results.items()
    }


# They say where a benchmark ran, not what it measured.
PLACES = ("output", "directory", "picture", "peer_python", "command", "platform")


def write_json(path: Path, benchmark: str, options: Any, figures: Mapping[str, Any]) -> None:
    """Writes a benchmark's figures with its options (a dataclass) and the facts of processor, packages and code."""
    from recipes.run_directory import environment

    content = {"benchmark": benchmark, "options": _without_places(asdict(options)), **figures}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, "environment": _without_places(environment())}, indent=2) + "\n")


def _without_places(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in facts.items() if name not in PLACES}


def _environment(is_ours: bool) -> dict[str, str]:
    """Only ours sees this checkout: other programs must not meet a folder called `kernels`."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return environment | ({"PYTHONPATH": str(ROOT)} if is_ours else {"HF_HUB_OFFLINE": "1"})
