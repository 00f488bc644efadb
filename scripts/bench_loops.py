"""Times whole runs by the loop's mode: engines and trainer in turns, one batch ahead, and all the time.

`python -m scripts.bench_loops`: the recipe's own runs, one after another, with the same steps and samples. In turns,
engine and trainer have every core each; at the same time, they share them out (`--threads-apart`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.run_directory import METRICS
from scripts.timing import ROOT, write_json

Mode = Literal["sync", "lagged", "async"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is run."""

    modes: tuple[Mode, ...] = ("sync", "lagged", "async")
    """Modes of the loop; the first is what the others are compared with."""
    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    dataset: str = "sums"
    """As the recipe's --dataset."""
    numerics: str = "float32"
    """As the recipe's --numerics."""
    num_steps: int = 100
    """Steps of each run."""
    num_prompts: int = 8
    """Prompts of a step."""
    group_size: int = 8
    """Samples of each prompt."""
    max_tokens: int = 32
    """Longest completion."""
    max_staleness: int = 2
    """Of the modes lagged and async."""
    threads_apart: int = 1
    """Threads of the engine, and of the trainer, where they work at the same time."""
    skipped_steps: int = 3
    """First steps that are not timed: the engines' queues fill, and caches warm up."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timed:
    """One run."""

    mode: str
    seconds: float  # of all timed steps
    samples_per_second: float
    rollout_share: float  # of the time, in which the trainer waited for samples
    train_share: float
    staleness_mean: float
    largest_mismatch: float


def main(options: Options) -> None:
    console = Console(width=120)
    runs = []
    for mode in options.modes:
        console.print(f"{mode}: {options.num_steps} steps", style="dim")
        runs.append(time_run(mode, options))
    console.print(table(runs, options))
    if options.output:
        write_json(options.output, "loops", options, {"runs": [asdict(run) for run in runs]})


def time_run(mode: Mode, options: Options) -> Timed:
    with tempfile.TemporaryDirectory() as directory:
        subprocess.run(command(mode, options, Path(directory)), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        lines = (Path(directory) / METRICS).read_text().splitlines()
    return timed(mode, options, [json.loads(line) for line in lines])


def command(mode: Mode, options: Options, directory: Path) -> list[str]:
    names = ("model", "dataset", "numerics", "num_steps", "num_prompts", "group_size", "max_tokens", "max_staleness")
    given = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in names]
    threads = [] if mode == "sync" else [f"--num-threads={options.threads_apart}"]
    # every sample is trained on, so that each step has the same work
    rest = [
        "--no-skip-zero-std-groups",
        "--no-check-stale-tokens",
        "--eval-every=0",
        "--no-save-weights",
        "--overwrite",
    ]
    places = [f"--output-dir={directory}", f"--mode={mode}"]
    return [sys.executable, "-m", "recipes.grpo_math", *given, *threads, *rest, *places]


def timed(mode: str, options: Options, history: list[dict[str, float]]) -> Timed:
    """From a run's metrics, one line a step."""
    steps = [line for line in history if line["step"] > options.skipped_steps]
    seconds = sum(line["timing_s/step"] for line in steps)
    return Timed(
        mode=mode,
        seconds=seconds,
        samples_per_second=len(steps) * options.num_prompts * options.group_size / seconds,
        rollout_share=sum(line["timing_s/rollout"] for line in steps) / seconds,
        train_share=sum(line["timing_s/train"] for line in steps) / seconds,
        staleness_mean=sum(line["staleness/mean"] for line in steps) / len(steps),
        largest_mismatch=max(line.get("mismatch/logprob_abs_diff_max") or 0.0 for line in steps),
    )


def table(runs: list[Timed], options: Options) -> Table:
    title = (
        f"{options.num_steps - options.skipped_steps} steps of {options.num_prompts} prompts x {options.group_size} "
        f"samples x at most {options.max_tokens} tokens, {options.numerics}"
    )
    headings = ("seconds", "samples/s", f"/ {runs[0].mode}", "waiting", "training", "staleness", "mismatch")
    shown = Table("mode", *headings, title=title, box=SIMPLE_HEAD)
    for run in runs:
        shown.add_row(
            run.mode, f"{run.seconds:.0f}", f"{run.samples_per_second:.2f}",
            f"{run.samples_per_second / runs[0].samples_per_second:.2f}", f"{run.rollout_share:.0%}",
            f"{run.train_share:.0%}", f"{run.staleness_mean:.2f}", f"{run.largest_mismatch}",
        )  # fmt: skip
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_loops", description=__doc__))
