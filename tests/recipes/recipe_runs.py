"""Runs of a recipe in processes of their own, for the tests that start, stop and kill them."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MARK = "LOCKSTEP_TEST_RUN"  # in the environment of a run and of every process that it starts
DEADLINE = 280


@dataclass
class Run:
    process: subprocess.Popen[str]
    output_dir: Path
    mark: str

    def wait(self) -> str:
        """The rest of what the run prints."""
        return self.process.communicate(timeout=DEADLINE)[0]

    def wait_for(self, text: str) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if text in line:
                return
        pytest.fail(f"the run ended with {self.process.wait()} and never printed {text!r}")

    def kill(self) -> int:
        """SIGKILL to the main process, and an end to all that it leaves; returns its exit code.

        Engines and trainer have nobody left and end by themselves. Two agents of Ray's may stay: they are ended here.
        """
        os.kill(self.process.pid, signal.SIGKILL)
        self.wait()
        end = time.monotonic() + 30
        while (left := self.processes_by_id()) and time.monotonic() < end and not all(map(is_agent, left.values())):
            time.sleep(0.1)
        assert all(map(is_agent, left.values())), left
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return self.process.returncode

    def processes(self) -> list[str]:
        """Command lines of the run's processes that are still there."""
        return list(self.processes_by_id().values())

    def processes_after(self, seconds: float) -> list[str]:
        """Those that are there still when `seconds` have passed."""
        end = time.monotonic() + seconds
        while self.processes() and time.monotonic() < end:
            time.sleep(0.2)
        return self.processes()

    def processes_by_id(self) -> dict[int, str]:
        """Their command lines."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_text().replace("\0", " ")
            except OSError:  # it has ended meanwhile, or is another user's
                continue
        return found


def is_agent(command_line: str) -> bool:
    """Whether it is one of those that a raylet starts to serve its node."""
    return command_line.startswith(("ray::DashboardAgent", "ray::RuntimeEnvAgent"))


def start_run(
    recipe: str, model: Path, dataset: str, output_dir: Path, *arguments: str, within: Sequence[str] = ()
) -> Run:
    """Starts `python -m recipes.{recipe}` on a tiny model, with samples of one token.

    within: a command that runs the one given after its own arguments.
    """
    mark = uuid.uuid4().hex
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"} | {MARK: mark}
    options = ["--model", str(model), "--dataset", dataset, "--output-dir", str(output_dir)]
    size = ["--num-prompts", "4", "--group-size", "8", "--max-tokens", "1", "--reward", "exact_match"]
    process = subprocess.Popen(
        [*within, sys.executable, "-m", f"recipes.{recipe}", *options, *size, *arguments],
        cwd=ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return Run(process, output_dir, mark)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]
