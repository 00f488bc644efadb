"""RunDirectory: the files that a run leaves behind.

metrics.jsonl      one line a step, under the names that dashboards know
config.yaml        the options; `--config OUTPUT_DIR/config.yaml` runs them again
environment.json   versions, kernel fingerprint, commit, threads, platform
rollouts.jsonl     samples of each step in readable form, with token ids and log-probabilities
report.html        curves and rollouts in one page for a browser; `python -m recipes.report OUTPUT_DIR` makes it again
reward_curve.png   reward and expected reward over the steps
trackers/          with --tracker: what TensorBoard or W&B reads
checkpoints/       with --checkpoint-every: what --resume goes on from, written by the trainer
weights/           the trained model in Hugging Face format, written by the trainer
journal/           with --journal: every sample and every switch of weights, for `python -m rollout.replay OUTPUT_DIR`;
                   the versions kept for that are weights/vNNNNNN
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, TextIO

import yaml

METRICS, CONFIG, ENVIRONMENT = "metrics.jsonl", "config.yaml", "environment.json"
ROLLOUTS, REWARD_CURVE, WEIGHTS, JOURNAL = "rollouts.jsonl", "reward_curve.png", "weights", "journal"
REPORT, TRACKERS, CHECKPOINTS = "report.html", "trackers", "checkpoints"

RECORDED_PACKAGES = ("torch", "numpy", "ray", "transformers", "accelerate", "datasets", "safetensors", "gguf",
                     "reasoning_gym", "math-verify", "tyro", "rich", "triton")  # fmt: skip
NOT_REPEATED = ("config", "output_dir", "overwrite", "resume")  # options that belong to one run only
GIT_SECONDS = 5
MEAN_REWARD, EXPECTED_REWARD = "reward/mean", "eval/expected_reward"  # what the picture shows


class RunDirectory:
    """One run's directory. Every line is on disk before the call that writes it returns, so a killed run loses none.

    overwrite: remove the run that is there. after_step: go on with it; lines of later steps, which a killed run may
    have written, are cut off, and `num_cut_lines` says how many.
    Raises ValueError for a file, or a directory that holds a run where neither is given.
    """

    def __init__(self, path: Path, overwrite: bool = False, after_step: int | None = None) -> None:
        self.path = path
        self.resumed: list[dict[str, Any]] = []  # the lines of metrics.jsonl that are gone on with
        self._rewards: list[dict[str, Any]] = []  # what the curve shows of each line; a long run has many
        self.has_metrics = False  # whether this process has logged any
        self.num_cut_lines = 0
        if path.exists() and not path.is_dir():
            raise ValueError(f"output_dir={str(path)!r} is a file; name a directory")
        if after_step is not None:
            self._go_on(after_step)
        elif (path / METRICS).exists():
            if not overwrite:
                raise ValueError(
                    f"{str(path)!r} holds a run already; name another --output-dir, or pass --overwrite, or --resume "
                    "auto if it left checkpoints"
                )
            self._remove_run()
        path.mkdir(parents=True, exist_ok=True)
        self._files: dict[str, TextIO] = {}
        self._environment = environment()

    def write_config(self, options: Mapping[str, Any]) -> None:
        """Writes the options that make up the run as --config reads them back."""
        values = {name: _plain(value) for name, value in options.items() if name not in NOT_REPEATED}
        self._write(CONFIG, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))

    def write_environment(self, facts: Mapping[str, Any]) -> None:
        """Writes what is known of the machine and the code, and `facts` (engine and trainer)."""
        self._write(ENVIRONMENT, json.dumps(self._environment | dict(facts), indent=2, default=str) + "\n")

    def log_metrics(self, metrics: Mapping[str, Any]) -> None:
        line = {name: _json_number(value) for name, value in metrics.items()}
        self._rewards.append(_rewards_of(line))
        self.has_metrics = True
        self._append(METRICS, [line])

    def log_rollouts(self, records: Iterable[Mapping[str, Any]]) -> None:
        self._append(ROLLOUTS, records)

    def draw_reward_curve(self, title: str) -> None:
        """Draws what metrics.jsonl holds; without a figure to draw it does nothing."""
        draw_reward_curve(self._rewards, self.path / REWARD_CURVE, title)

    def close(self) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _append(self, name: str, lines: Iterable[Mapping[str, Any]]) -> None:
        if name not in self._files:
            # half of a surrogate pair, which a data set may hold, is written as the escape that JSON has for it
            self._files[name] = (self.path / name).open("a", encoding="utf-8", errors="backslashreplace")
        self._files[name].writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        self._files[name].flush()
        os.fsync(self._files[name].fileno())  # a checkpoint must not outlive the lines of the steps before it

    def _write(self, name: str, text: str) -> None:
        partial = self.path / f"{name}.partial"
        partial.write_text(text, encoding="utf-8")
        partial.replace(self.path / name)

    def _go_on(self, step: int) -> None:
        for name in (METRICS, ROLLOUTS):
            lines, num_cut = cut_back(self.path / name, step)
            self.num_cut_lines += num_cut
            if name == METRICS:
                self.resumed, self._rewards = lines, [_rewards_of(line) for line in lines]

    def _remove_run(self) -> None:
        """Removes a run's own files, and nothing else that may be there."""
        for name in (METRICS, CONFIG, ENVIRONMENT, ROLLOUTS, REWARD_CURVE, REPORT):
            (self.path / name).unlink(missing_ok=True)
        for name in (WEIGHTS, JOURNAL, TRACKERS, CHECKPOINTS):
            shutil.rmtree(self.path / name, ignore_errors=True)


def cut_back(path: Path, step: int) -> tuple[list[dict[str, Any]], int]:
    """Cuts a file of JSON lines in the order of their `step` after those of a step, or before one that is torn.

    Returns the lines that stay, and how many were cut off. A file that is not there stays so.
    """
    if not path.exists():
        return [], 0
    lines, end = [], 0
    with path.open("rb+") as file:
        raw_lines = file.readlines()
        for raw_line in raw_lines:
            line = _parsed(raw_line)
            if line is None or line["step"] > step:
                break
            lines.append(line)
            end += len(raw_line)
        file.truncate(end)
    return lines, len(raw_lines) - len(lines)


def ended_before_its_first_checkpoint(path: Path) -> bool:
    """Whether the directory holds a run that makes checkpoints and has not come to its first one."""
    try:
        every = yaml.safe_load((path / CONFIG).read_text(encoding="utf-8")).get("checkpoint_every", 0)
        num_lines = (path / METRICS).read_bytes().count(b"\n")
    except (OSError, yaml.YAMLError, AttributeError):
        return False
    return every > 0 and num_lines - 1 <= every  # step 0 has a line, too


def default_path(dataset: str, now: time.struct_time) -> Path:
    """outputs/grpo-{data set}-{time}: a new directory for every run."""
    name = "".join(letter if letter.isalnum() or letter in "._-" else "-" for letter in Path(dataset).name)
    return Path("outputs") / f"grpo-{name}-{time.strftime('%Y%m%d-%H%M%S', now)}"


def environment() -> dict[str, Any]:
    """Facts that fix or explain a run's figures, gathered without importing anything heavy."""
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "commit": git_commit(Path(__file__).parent),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor_name(),
        "num_cores": os.cpu_count(),
        "num_available_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "versions": {name: version for name in RECORDED_PACKAGES if (version := _version(name))},
    }


def git_commit(directory: Path) -> str | None:
    """The checked-out commit, with "+changes" if files differ from it; None outside a git repository."""
    commit = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}+changes" if commit and changes else commit or None


def processor_name() -> str:
    """The processor's model, as the kernel names it where there is /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def _rewards_of(line: Mapping[str, Any]) -> dict[str, Any]:
    return {name: line[name] for name in ("step", MEAN_REWARD, EXPECTED_REWARD) if line.get(name) is not None}


def draw_reward_curve(history: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Reward of each step with its running mean, and the expected reward where it was measured, as a PNG."""
    reward = _series(history, MEAN_REWARD)
    expected = _series(history, EXPECTED_REWARD)
    if not reward and not expected:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if reward:
        steps, values = zip(*reward, strict=True)
        axes.plot(steps, values, ".", color="#9aa7b1", markersize=5, label="reward of the step's samples")
        axes.plot(steps, running_mean(values), color="#1f6f8b", linewidth=2, label="its running mean")
    if expected:
        steps, values = zip(*expected, strict=True)
        axes.plot(steps, values, "o-", color="#e07a2f", linewidth=2, markersize=5, label="expected reward, held out")
        for step, value in (expected[0], expected[-1]):
            axes.annotate(f"{value:.3f}", (step, value), textcoords="offset points", xytext=(0, 9), ha="center")
    axes.set(title=title, xlabel="step", ylabel="reward")
    axes.set_ylim(bottom=min(0.0, *(value for _, value in reward + expected)))
    axes.margins(x=0.03, y=0.12)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="best")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial)
    partial.replace(path)  # a reader never sees half a picture


def running_mean(values: Sequence[float], decay: float = 0.8) -> list[float]:
    """Exponential running mean, unbiased at the start."""
    means, total, weight = [], 0.0, 0.0
    for value in values:
        total = decay * total + (1 - decay) * value
        weight = decay * weight + (1 - decay)
        means.append(total / weight)
    return means


def _series(history: Sequence[Mapping[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in history if name in line]


def _parsed(raw_line: bytes) -> dict[str, Any] | None:
    """None for what a killed process or machine left of a line."""
    try:
        return json.loads(raw_line) if raw_line.endswith(b"\n") else None
    except ValueError:
        return None


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity; they become null."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(
            ["git", *arguments], cwd=directory, capture_output=True, text=True, timeout=GIT_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()
