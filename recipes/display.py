"""Display: shows a run as it learns, as a live panel in a terminal and as one line a step everywhere else."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from recipes.run_directory import EXPECTED_REWARD

Metrics = Mapping[str, float]
DisplayMode = Literal["auto", "live", "plain"]

REWARD = "reward/mean"
RESPONSE_LENGTH = "response_length/mean"
ROLLOUT_SPEED = "perf/rollout_tokens_per_second"
TRAIN_SPEED = "perf/train_tokens_per_second"
MISMATCH = "mismatch/logprob_abs_diff_max"
PHASES = {  # a step's phases in order: metric -> (name, colour)
    "timing_s/rollout": ("rollout", "cyan"),
    "timing_s/reward": ("reward", "yellow"),
    "timing_s/train": ("train", "magenta"),
    "timing_s/weight_sync": ("sync", "green"),
}
TRENDS = {  # metric -> (label, figure, style, whether it is drawn on a scale of 0 to 1)
    EXPECTED_REWARD: ("expected reward", "{:.3f}", "bold green", True),
    REWARD: ("reward", "{:.3f}", "green", True),
    RESPONSE_LENGTH: ("response length", "{:.1f}", "cyan", False),
    ROLLOUT_SPEED: ("rollout", "{:,.0f}", "cyan", False),
    TRAIN_SPEED: ("training", "{:,.0f}", "cyan", False),
}
NOTHING_YET = Text("···", style="dim")
SHORTEST_NAMED_PHASE = 0.05  # seconds

SPARK_LEVELS = "▁▂▃▄▅▆▇"  # without the full block, so that rows do not run into each other
LABEL_WIDTH = 15
MAX_TREND_WIDTH = 32
MAX_PANEL_WIDTH = 100
WIDTH_BESIDE_TREND = 66  # frame, label, figure and words of the panel's rows


@dataclass(slots=True, kw_only=True)
class Progress:
    """What has been seen of a run so far; the display draws nothing else."""

    title: str  # "smollm2-135m-instruct on sums"
    num_steps: int
    output_dir: str = ""
    details: Mapping[str, str] = field(default_factory=dict)  # metric -> the words after its figure
    step: int = 0
    history: dict[str, list[float]] = field(default_factory=dict)  # metric -> its values, oldest first
    phase: str = "starting"
    started: float = field(default_factory=time.monotonic)
    first_step_started: float | None = None  # what the time left is reckoned from
    first_step: int = 0  # the step that had been done then
    sample: tuple[str, str, float | None] | None = None  # prompt, completion and reward of one rollout

    def add(self, step: int, metrics: Metrics) -> None:
        self.step = step
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self.history.setdefault(name, []).append(float(value))
        if EXPECTED_REWARD not in metrics and EXPECTED_REWARD in self.history:  # measured now and then, drawn as steps
            self.history[EXPECTED_REWARD].append(self.history[EXPECTED_REWARD][-1])

    def latest(self, name: str) -> float | None:
        return self.history[name][-1] if self.history.get(name) else None

    def seconds_left(self, now: float) -> float | None:
        num_done = self.step - self.first_step
        if self.first_step_started is None or not num_done:
            return None
        return (now - self.first_step_started) / num_done * (self.num_steps - self.step)


class PlainDisplay:
    """One line a step, for files, pipes and continuous integration."""

    def __init__(self, progress: Progress, console: Console) -> None:
        self.progress = progress
        self.console = console

    def __enter__(self) -> PlainDisplay:
        self.note(self.progress.phase)
        return self

    def __exit__(self, *exception: object) -> None:
        self.progress.phase = ""

    def show_phase(self, phase: str) -> None:
        self.progress.phase = phase

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.progress.add(step, metrics)
        self.note(step_line(step, self.progress.num_steps, metrics))

    def show_sample(self, prompt: str, completion: str, reward: float | None) -> None:
        self.progress.sample = (prompt, completion, reward)

    def note(self, text: str) -> None:
        """Prints a line of its own, unwrapped, and at once also where stdout is a pipe."""
        self.console.print(text, soft_wrap=True, markup=False, highlight=False)
        self.console.file.flush()


class LiveDisplay(PlainDisplay):
    """A panel that is redrawn in place four times a second; what is printed meanwhile scrolls by above it."""

    def __init__(self, progress: Progress, console: Console) -> None:
        super().__init__(progress, console)
        self.spinner = Spinner("dots", style="cyan")
        self.live = Live(console=console, refresh_per_second=4, get_renderable=self.render, vertical_overflow="visible")

    def __enter__(self) -> LiveDisplay:
        self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        super().__exit__(*exception)
        self.live.stop()

    def on_step(self, step: int, metrics: Metrics) -> None:
        self.progress.add(step, metrics)
        self.live.refresh()

    def render(self) -> RenderableType:
        return render(self.progress, time.monotonic(), self.spinner, self.console.width)


def make_display(progress: Progress, mode: DisplayMode = "auto", console: Console | None = None) -> PlainDisplay:
    """A live panel where there is a terminal to draw it in, else plain lines; `mode` overrules."""
    console = console or Console()
    is_live = console.is_terminal and not console.is_dumb_terminal if mode == "auto" else mode == "live"
    return LiveDisplay(progress, console) if is_live else PlainDisplay(progress, console)


def step_line(step: int, num_steps: int, metrics: Metrics) -> str:
    """One step in one line; figures that a step doesn't have are left out."""
    parts = [f"step {step:>{len(str(num_steps))}}/{num_steps}"]
    formats = {
        REWARD: "reward {:.3f}",
        RESPONSE_LENGTH: "length {:.1f}",
        ROLLOUT_SPEED: "{:.0f} tokens/s",
    }
    parts += [text.format(metrics[name]) for name, text in formats.items() if name in metrics]
    parts += [f"mismatch {_exact(metrics[MISMATCH])}"] if MISMATCH in metrics else []
    seconds = [f"{name} {metrics[key]:.1f}s" for key, (name, _) in PHASES.items() if key in metrics]
    parts += [" ".join(seconds)] if seconds else []
    parts += [f"expected reward {metrics[EXPECTED_REWARD]:.3f}"] if EXPECTED_REWARD in metrics else []
    return " | ".join(parts)


def sparkline(values: Sequence[float], width: int, low: float | None = None, high: float | None = None) -> str:
    """Values as a row of bars, at most `width` of them; longer histories are averaged into as many bins."""
    if not values:
        return ""
    bins = _binned(values, width)
    low = min(bins) if low is None else low
    high = max(bins) if high is None else high
    span = high - low
    top = len(SPARK_LEVELS) - 1
    return "".join(SPARK_LEVELS[_clamp(round((value - low) / span * top), top) if span > 0 else 0] for value in bins)


def render(progress: Progress, now: float, spinner: Spinner | None, width: int) -> RenderableType:
    """The whole panel at the time `now` (monotonic seconds), for a terminal of `width` columns."""
    panel_width = min(width, MAX_PANEL_WIDTH)
    trend_width = max(8, min(MAX_TREND_WIDTH, panel_width - WIDTH_BESIDE_TREND))
    parts = [_progress_row(progress, now, spinner, trend_width), Text(), _metrics_table(progress, trend_width)]
    if any(progress.latest(name) is not None for name in PHASES):
        parts += [Text(), _phase_row(progress, trend_width)]
    if progress.sample:
        parts += [Text(), _sample_row(progress.sample)]
    return Panel(
        Group(*parts),
        title=f"[bold]Lockstep[/bold]  {escape(progress.title)}",
        title_align="left",
        subtitle=f"[dim]{escape(progress.output_dir)}[/dim]" if progress.output_dir else None,
        subtitle_align="right",
        border_style="cyan",
        width=panel_width,
        padding=(1, 2),
    )


def _row_grid(trend_width: int) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(width=LABEL_WIDTH, no_wrap=True)
    grid.add_column(width=trend_width, no_wrap=True)
    return grid


def _progress_row(progress: Progress, now: float, spinner: Spinner | None, trend_width: int) -> RenderableType:
    left = progress.seconds_left(now) if progress.phase else None
    row = _row_grid(trend_width)
    row.add_column(no_wrap=True, style="dim")
    row.add_column(no_wrap=True, style="dim")
    state: RenderableType = Text(progress.phase)
    if spinner is not None and progress.phase:
        spinner.update(text=Text(progress.phase))
        state = spinner
    row.add_row(
        Text(f"step {progress.step} of {progress.num_steps}", style="bold"),
        ProgressBar(total=progress.num_steps, completed=progress.step, width=trend_width, complete_style="cyan"),
        _clock(now - progress.started) + (f", {_clock(left)} to go" if left else ""),
        state,
    )
    return row


def _metrics_table(progress: Progress, trend_width: int) -> RenderableType:
    table = _row_grid(trend_width)
    table.add_column(justify="right", width=7, no_wrap=True)
    table.add_column(style="dim", no_wrap=True, overflow="ellipsis")
    for name, (label, figure, style, is_share) in TRENDS.items():
        values = progress.history.get(name, [])
        high = max([1.0, *values]) if is_share else None
        trend = Text(sparkline(values, trend_width, low=min([0.0, *values]), high=high), style=style)
        latest = Text(figure.format(values[-1]) if values else "", style=style)
        table.add_row(label, trend if values else NOTHING_YET, latest, _words(progress, name))
    table.add_row("mismatch", *_mismatch_cells(progress, trend_width))
    return table


def _words(progress: Progress, name: str) -> str:
    values = progress.history.get(name, [])
    since_start = [f"from {values[0]:.3f}"] if name == EXPECTED_REWARD and len(values) > 1 else []
    return ", ".join([*since_start, progress.details.get(name, "")]) if values else ""


def _mismatch_cells(progress: Progress, trend_width: int) -> tuple[Text, Text, str]:
    """The largest difference between a rollout's and the trainer's log-probability, over the whole run."""
    values = progress.history.get(MISMATCH)
    if not values:
        return NOTHING_YET, Text(), ""
    worst = max(values)
    is_exact = worst == 0.0
    style = "bold green" if is_exact else "bold red"
    marks = "".join("•" if value == 0.0 else "!" for value in values[-trend_width:])
    words = progress.details.get(MISMATCH, "") if is_exact else "rollout and trainer differ"
    return Text(marks, style=style), Text(_exact(worst), style=style), words


def _phase_row(progress: Progress, trend_width: int) -> RenderableType:
    """The latest step's seconds as one bar, cut by phase, and a legend."""
    seconds = {key: progress.latest(key) or 0.0 for key in PHASES}
    bar, legend = Text(), Text()
    for key, width in zip(PHASES, _shares(list(seconds.values()), trend_width), strict=True):
        name, colour = PHASES[key]
        bar.append("█" * width, style=colour)
        if seconds[key] >= SHORTEST_NAMED_PHASE:
            legend.append(f"{name} {seconds[key]:.1f}  ", style=colour)
    row = _row_grid(trend_width)
    row.add_column(no_wrap=True, overflow="ellipsis")
    row.add_row("seconds a step", bar, legend)
    return row


def _sample_row(sample: tuple[str, str, float | None]) -> RenderableType:
    prompt, completion, reward = sample
    text = Text("latest sample".ljust(LABEL_WIDTH + 2), no_wrap=True, overflow="ellipsis")
    text.append(_last_line(prompt), style="dim").append(_one_line(completion), style="bold")
    if reward is not None:
        text.append(f"   reward {reward:g}", style="green" if reward > 0 else "red")
    return text


def _shares(values: Sequence[float], width: int) -> list[int]:
    """Whole numbers in proportion to the values that add up to `width`, by largest remainder."""
    total = sum(values)
    if total <= 0:
        return [0] * len(values)
    exact = [value / total * width for value in values]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(values)), key=lambda index: shares[index] - exact[index])
    for index in by_remainder[: width - sum(shares)]:
        shares[index] += 1
    return shares


def _binned(values: Sequence[float], width: int) -> list[float]:
    if len(values) <= width:
        return list(values)
    edges = [index * len(values) // width for index in range(width + 1)]
    return [sum(values[start:end]) / (end - start) for start, end in itertools.pairwise(edges)]


def _exact(difference: float) -> str:
    """Only an exact zero reads 0.0."""
    return "0.0" if difference == 0.0 else f"{difference:.2g}"


def _clamp(level: int, top: int) -> int:
    return max(0, min(top, level))


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _last_line(text: str) -> str:
    return (text.rstrip().splitlines() or [""])[-1]


def _one_line(text: str) -> str:
    return text.replace("\n", "⏎")
