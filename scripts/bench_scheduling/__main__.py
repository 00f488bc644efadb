"""`python -m scripts.bench_scheduling`: V1-style scheduling beside a V0-style loop, and what the engine's host costs.

Every loop gets the same load by the same clock; the loops take turns. Loads (a) and (b) run on real kernels and random
weights, in the shape of SmolLM2-135M cut to two layers; (a) also in one with a small body and a large vocabulary and on
a stand-in with a GPU's times (`stream.STREAMS` says why: what (a) shows depends on it). (c) runs on stand-ins.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scripts.bench_scheduling import overhead, peer, stream
from scripts.bench_scheduling.comparison import (
    STAND_IN_SECONDS,
    Comparison,
    compare_burst,
    compare_groups,
)
from scripts.bench_scheduling.variants import TINY
from scripts.timing import results_table, summary, write_json

Section = Literal["stream", "groups", "burst", "host", "peer"]
RUNNING = (1, 4, 16, 64, 256, 1024, 4096)
USUAL_RUNNING = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    sections: tuple[Section, ...] = ("stream", "groups", "burst", "host", "peer")
    """Loads (a), (b) and (c), the host's work in a step, and requests a second beside vLLM."""
    numerics: Literal["float32", "bfloat16", "bfloat16-dot"] = "bfloat16-dot"
    """Profile of the kernels in (a) and (b)."""
    streams: tuple[Literal["smollm2-cut", "wide", "h100-8b"], ...] = ("smollm2-cut", "wide", "h100-8b")
    """Machines of (a)."""
    stream_seconds: float = 12.0
    """How long requests arrive in (a)."""
    stream_seeds: int = 5
    """Streams of (a); the variants that are neither V0's nor the whole engine run the first one only."""
    repetitions: int = 3
    """Turns of (b), (c) and of the requests beside vLLM."""
    peer_python: str | None = None
    """The Python of an environment that has vLLM, to time it as well."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    console = Console(width=180)
    sections: dict[Section, Callable[[Options, Console], Any]] = {
        "stream": run_stream,
        "groups": run_groups,
        "burst": run_bursts,
        "host": run_host,
        "peer": run_peer,
    }
    figures = {name: sections[name](options, console) for name in options.sections}
    if options.output:
        write_json(options.output, "scheduling", options, figures)


def run_stream(options: Options, console: Console) -> dict[str, Any]:
    figures = {}
    for name in options.streams:
        profile = {"numerics": options.numerics}
        sizing, comparison = stream.compare_stream(name, options.stream_seconds, options.stream_seeds, profile)
        figures[name] = {"sizing": asdict(sizing), **shown(comparison, console)}
    return figures


def run_groups(options: Options, console: Console) -> dict[str, Any]:
    return shown(compare_groups(options.repetitions, {"numerics": options.numerics}), console)


def run_bursts(options: Options, console: Console) -> list[dict[str, Any]]:
    return [shown(compare_burst(seconds, options.repetitions), console) for seconds in STAND_IN_SECONDS]


def run_host(options: Options, console: Console) -> dict[str, Any]:
    """Where the time of a step goes that is not the device's."""
    growth = {size: overhead.scheduler_milliseconds(size) for size in RUNNING}
    exponent = overhead.growth_exponent(list(growth), list(growth.values()))
    console.print(growth_table(growth, exponent))
    parts = {name: overhead.host_parts(USUAL_RUNNING, is_v0) for name, is_v0 in (("V0-style loop", 1), ("Lockstep", 0))}
    console.print(parts_table(parts))
    hidden = {seconds: overhead.hidden_share(USUAL_RUNNING, seconds) for seconds in STAND_IN_SECONDS}
    console.print(hidden_table(hidden))
    return {"scheduler_ms": growth, "growth_exponent": exponent, "host_parts_ms": parts, "hidden": hidden}


def run_peer(options: Options, console: Console) -> dict[str, Any]:
    results = peer.requests_per_second(TINY, options.peer_python, options.repetitions, console)
    ours = list(peer.OURS)
    console.print(results_table(peer.TITLE, "requests/s", results, ours[:1], digits=0))
    return summary(results, ours)


def shown(comparison: Comparison, console: Console) -> dict[str, Any]:
    console.print(comparison.table())
    return comparison.as_json()


def growth_table(growth: dict[int, float], exponent: float) -> Table:
    title = f"Scheduler alone, a decode step: time grows as the number of running requests to the power {exponent:.2f}"
    table = Table("running", *map(str, growth), title=title, box=SIMPLE_HEAD)
    table.add_row("ms a step", *(f"{milliseconds:.3f}" for milliseconds in growth.values()))
    table.add_row("us a request", *(f"{1e3 * milliseconds / size:.2f}" for size, milliseconds in growth.items()))
    return table


def parts_table(parts: dict[str, dict[str, float]]) -> Table:
    title = f"The host's part of a decode step of {USUAL_RUNNING} requests, ms, nothing overlapped"
    table = Table("", *overhead.PARTS, "sum", title=title, box=SIMPLE_HEAD)
    for name, row in parts.items():
        table.add_row(name, *(f"{milliseconds:.3f}" for milliseconds in row.values()), f"{sum(row.values()):.3f}")
    return table


def hidden_table(hidden: dict[float, dict[str, float]]) -> Table:
    title = f"A decode step of {USUAL_RUNNING} requests on stand-ins, ms, and how much of the host's work async hides"
    table = Table("device", "synchronous", "asynchronous", "hidden", title=title, box=SIMPLE_HEAD)
    for row in hidden.values():
        table.add_row(*(f"{row[name]:.2f}" for name in ("device", "sync", "async")), f"{row['hidden']:.0%}")
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_scheduling", description=__doc__))
