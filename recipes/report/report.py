"""Report: follows a run and writes its page, at a cost per step that does not grow with the run."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from ..run_directory import CONFIG, ENVIRONMENT, METRICS, REPORT, ROLLOUTS
from .charts import groups_of
from .curves import Curves
from .page import Page, render
from .samples import Samples
from .summary import tiles, title

REST = 50  # after a page was written, it is left alone for so many times as long as that took


class Report:
    """The page of the run in a directory: told of every step, it writes when that is cheap, and when it is asked to.

    What it holds in memory is bounded, and so is the page: curves are summed up in at most `curves.MAX_BUCKETS`
    buckets, and of the rollouts a budget is kept that spreads over the steps. Pages of the same files are equal.
    """

    def __init__(self, directory: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.directory, self.clock = directory, clock
        self.curves, self.samples = Curves(), Samples()
        self._write_again_at = float("-inf")

    @classmethod
    def read(cls, directory: Path) -> Report:
        """The report of what a run's files hold so far, to write it or to go on with it; of no files it is empty.

        Raises ValueError where a line is not as a run writes it; a last line that is still being written is left out.
        """
        report = cls(directory)
        for metrics in _read_lines(directory / METRICS):
            report.curves.add(metrics)
        for _, records in groupby(_read_lines(directory / ROLLOUTS), key=lambda record: record["step"]):
            report.samples.add(list(records))
        return report

    @property
    def path(self) -> Path:
        return self.directory / REPORT

    def add(self, metrics: Mapping[str, Any], rollouts: Sequence[Mapping[str, Any]] = ()) -> None:
        """A line of metrics.jsonl, and its step's lines of rollouts.jsonl. Steps come in order."""
        self.curves.add(metrics)
        self.samples.add(rollouts)

    def write_if_due(self) -> None:
        """Writes the page unless that would take more than a fiftieth of the run's time."""
        if self.clock() >= self._write_again_at:
            self.write()

    def write(self) -> Path:
        """Writes the page as the run's files are now; whoever reads it meanwhile sees the page from before."""
        started = self.clock()
        partial = self.path.with_suffix(".partial.html")
        partial.write_text(self._render(), encoding="utf-8")
        partial.replace(self.path)
        ended = self.clock()
        self._write_again_at = ended + REST * (ended - started)
        return self.path

    def _render(self) -> str:
        config, environment = _read_config(self.directory), _read_environment(self.directory)
        curves = self.curves.as_json()
        return render(
            Page(
                title=title(config),
                tiles=tiles(self.curves, config, environment, (self.directory / METRICS).stat().st_mtime),
                tables={"Options": config, "Environment": environment},
                charts=groups_of([name for name, curve in curves.items() if curve["mean"]]),
                curves={name: curve for name, curve in curves.items() if curve["mean"]},
                stride=self.curves.stride,
                samples_json=self.samples.as_json(),
            )
        )


def from_files(directory: Path) -> Path:
    """Makes the page of a run from its files; returns its path. ValueError where there is no run: see Report.read."""
    if not (directory / METRICS).is_file():
        raise ValueError(f"{str(directory)!r} holds no run: it has no {METRICS}; name the --output-dir of one")
    return Report.read(directory).write()


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a .jsonl file, one at a time; of a file that is not there, none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        yield from _parsed(file, path)


def _parsed(lines: Iterable[str], path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, start=1):
        if not line.endswith("\n"):  # only the last one, of a run that is writing it or died as it did
            return
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number} is no JSON: {error}") from error
        if not isinstance(value, dict) or not isinstance(value.get("step"), int):
            raise ValueError(f"{path}, line {number} must be an object with a `step`, as a run writes them")
        yield value


def _read_config(directory: Path) -> dict[str, Any]:
    try:
        return yaml.safe_load((directory / CONFIG).read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        return {}


def _read_environment(directory: Path) -> dict[str, Any]:
    try:
        return json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
