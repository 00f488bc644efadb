"""Learning: trains the default recipe by every algorithm and in every mode, and tells what each run came to.

`python -m scripts.bench_learning`: one process a run, one after another. What is interrupted goes on where it was: a
run that has ended is not made again, one that was under way is taken up from its latest checkpoint.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from recipes.run_directory import CHECKPOINTS, METRICS
from scripts.timing import ROOT, write_json

EXPECTED, MISMATCH = "eval/expected_reward", "mismatch/logprob_abs_diff_max"
ALGORITHMS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline")


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One line of the table."""

    name: str
    recipe: str
    arguments: tuple[str, ...]
    num_steps: int = 20

    def command(self, directory: Path) -> list[str]:
        kept = ["--output-dir", str(directory), "--resume", "auto", "--checkpoint-every", "10", "--no-save-weights"]
        steps = ["--num-steps", str(self.num_steps), "--eval-every", "5"]
        return [sys.executable, "-m", f"recipes.{self.recipe}", *self.arguments, *steps, *kept]


def _grpo(name: str, *arguments: str) -> Run:
    return Run(name=name, recipe="grpo_math", arguments=arguments)


RUNS = {
    run.name: run
    for run in (
        *(_grpo(name, "--algorithm", name) for name in ALGORITHMS),
        _grpo("grpo-seed1", "--algorithm", "grpo", "--seed", "1"),
        _grpo("grpo-seed2", "--algorithm", "grpo", "--seed", "2"),
        _grpo("grpo-shuffled", "--algorithm", "grpo", "--shuffle-rewards"),
        _grpo("grpo-lagged", "--algorithm", "grpo", "--mode", "lagged"),
        _grpo("grpo-async", "--algorithm", "grpo", "--mode", "async"),
        Run(name="ppo", recipe="ppo_math", arguments=(), num_steps=30),
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Which runs, and where they leave their files."""

    runs: tyro.conf.Positional[tuple[str, ...]] = tuple(RUNS)
    """Names of runs; all of them where none is given."""
    directory: Path = Path("outputs/learning")
    """Each run has a directory of its own in it."""
    output: Path | None = None
    """Where to write all figures, as JSON."""
    picture: Path | None = None
    """Where to draw the curves, as PNG."""

    def __post_init__(self) -> None:
        if unknown := set(self.runs) - RUNS.keys():
            raise ValueError(f"there are no runs {sorted(unknown)}; there are {', '.join(RUNS)}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a run came to."""

    name: str
    steps: list[int]  # at which the expected reward was measured
    expected_reward: list[float]  # at these
    largest_mismatch: float
    num_compared_tokens: int
    seconds: float  # of all steps, evaluations apart

    @property
    def gain(self) -> float:
        return self.expected_reward[-1] - self.expected_reward[0]


def main(options: Options) -> None:
    console = Console(width=120)
    outcomes = []
    for name in options.runs:
        console.print(f"{name}: {options.directory / name}", style="dim")
        outcomes.append(make(RUNS[name], options.directory / name))
    console.print(table(outcomes))
    if options.picture:
        draw(outcomes, options.picture)
    if options.output:
        write_json(options.output, "learning", options, {"runs": [asdict(one) for one in outcomes]})


def make(run: Run, directory: Path) -> Outcome:
    """Runs what is left of a run. CalledProcessError where it fails; the next call goes on with it."""
    directory = directory.absolute()
    marker = directory / "done"
    if not marker.exists():
        subprocess.run(run.command(directory), cwd=ROOT, check=True)
        marker.touch()
        shutil.rmtree(directory / CHECKPOINTS, ignore_errors=True)  # gigabytes that nobody goes on from
    lines = (directory / METRICS).read_text().splitlines()
    return outcome(run.name, [json.loads(line) for line in lines])


def outcome(name: str, history: Sequence[Mapping[str, Any]]) -> Outcome:
    """From a run's metrics, one line a step."""
    measured = [line for line in history if line.get(EXPECTED) is not None]
    return Outcome(
        name=name,
        steps=[line["step"] for line in measured],
        expected_reward=[line[EXPECTED] for line in measured],
        largest_mismatch=max((line.get(MISMATCH) or 0.0 for line in history), default=0.0),
        num_compared_tokens=sum(line.get("mismatch/num_tokens") or 0 for line in history),
        seconds=sum(line.get("timing_s/step") or 0.0 for line in history),
    )


def table(outcomes: Sequence[Outcome]) -> Table:
    headings = ("steps", "expected reward", "gain", "largest mismatch", "tokens compared", "minutes")
    shown = Table("run", *headings, title="Exact probability of the right answer, held-out problems", box=SIMPLE_HEAD)
    for one in outcomes:
        shown.add_row(
            one.name, str(one.steps[-1]), f"{one.expected_reward[0]:.3f} -> {one.expected_reward[-1]:.3f}",
            f"{one.gain:+.3f}", f"{one.largest_mismatch}", f"{one.num_compared_tokens:,}", f"{one.seconds / 60:.1f}",
        )  # fmt: skip
    return shown


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for place, one in enumerate(outcomes):
        style = "--" if "shuffled" in one.name else ("-", "-.")[place // 10]  # ten colours go round
        axes.plot(one.steps, one.expected_reward, style, marker="o", markersize=3, linewidth=1.5, label=one.name)
    axes.set(title="Exact probability of the right answer, held-out problems", xlabel="step", ylabel="expected reward")
    axes.set_ylim(0, 1)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, ncols=2)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_learning", description=__doc__))
