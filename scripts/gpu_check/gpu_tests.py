"""The tests of the GPU kernels in processes of their own, beside other work: most of their time is compiling."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from scripts.gpu_check.report import ROOT, Row

NUM_PROCESSES = 4
PATHS = ("tests/kernels/gpu",)
IGNORED = ("tests/kernels/gpu/test_ahead_of_time.py",)  # it needs no device
INI = "[pytest]\nmarkers =\n    slow: takes long\n    gpu: needs a CUDA device\n"


class GPUTests:
    """Started when made. pyproject.toml is left aside, since it asks for a plugin that this machine may lack."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory()
        self._processes: list[tuple[subprocess.Popen, Path]] = []
        (Path(self._directory.name) / "pytest.ini").write_text(INI)
        for number, tests in enumerate(split(self._collect(), NUM_PROCESSES)):
            log = Path(self._directory.name) / f"{number}.log"
            command = self._command("-q", "--tb=short", *tests)
            with log.open("w") as file:
                process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
            self._processes.append((process, log))

    def wait(self, rows: list[Row], seconds: float) -> None:
        """A row for each process and each test that failed; what still runs after `seconds` is ended."""
        deadline = time.monotonic() + seconds
        for process, log in self._processes:
            try:
                code: int | str = process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                code = "ended for lack of time"
                self._end(process)
            lines = log.read_text(errors="replace").splitlines()
            rows.append(
                {"check": "pytest", "passed": code == 0, "why": _summary(lines) if code in (0, 1) else str(code)}
            )
            for line in lines:
                if line.startswith(("FAILED", "ERROR")):
                    rows.append({"check": line[:160], "passed": False})
            if code not in (0, 1):
                rows[-1]["log"] = "\n".join(lines[-15:])

    def close(self) -> None:
        for process, _ in self._processes:
            self._end(process)
        self._directory.cleanup()

    def _collect(self) -> list[str]:
        command = self._command("--collect-only", "-q")
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        tests = [line for line in result.stdout.splitlines() if "::" in line and not line.startswith(" ")]
        if result.returncode or not tests:
            raise RuntimeError(f"pytest found no tests:\n{(result.stdout + result.stderr)[-2000:]}")
        return tests

    def _command(self, *arguments: str) -> list[str]:
        places = [] if any("::" in argument for argument in arguments) else list(PATHS)
        return [
            sys.executable, "-m", "pytest", "-c", str(Path(self._directory.name) / "pytest.ini"), f"--rootdir={ROOT}",
            f"--confcutdir={ROOT}", "--import-mode=importlib", "-p", "no:cacheprovider", "-m", "not slow",
            *(f"--ignore={path}" for path in IGNORED), *arguments, *places,
        ]  # fmt: skip

    @staticmethod
    def _end(process: subprocess.Popen) -> None:
        if process.poll() is None:
            process.kill()
            process.wait()


def split(tests: list[str], num_parts: int) -> list[list[str]]:
    """Tests dealt out in turns, so that every part gets some of each file."""
    return [part for part in (tests[number::num_parts] for number in range(num_parts)) if part]


def _summary(lines: list[str]) -> str:
    found = [line for line in lines if re.search(r"\d+ (passed|failed|error)", line)]
    return found[-1].strip("= ") if found else "no summary"
