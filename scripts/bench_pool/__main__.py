"""`python -m scripts.bench_pool [scale] [backlog] [operations] [async]`: what the service around the engines costs.

`scale`: rollouts a second by the number of engines. `backlog`: memory while a long queue is worked off. `operations`:
the coordinator's work for a group, and its messages. `async`: asynchronous training beside a synchronous loop. Engines
sleep in place of computing, so everything that is measured is the service; each section's module says how.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any, Literal

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scripts.bench_pool import backlog, operations, overlap, scale
from scripts.bench_pool.processes import ROLES
from scripts.timing import write_json

Section = Literal["scale", "backlog", "operations", "async"]
MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure, and how much of it."""

    sections: tyro.conf.Positional[tuple[Section, ...]] = ("scale", "backlog", "operations", "async")
    """Which sections."""

    engines: tuple[int, ...] = (1, 2, 4, 8, 32)
    """scale: engine actors. All of them live on this machine, each with about 0.2 GB of its own."""
    seats: int = 32
    """scale, backlog: samples that one engine runs at once (max_num_seqs)."""
    tokens: int = 16
    """scale: tokens of a sample, on average."""
    step_seconds: float = 0.02
    """scale: of an engine's step, in which each of its samples gets a token."""
    group_sizes: tuple[int, ...] = (1, 8)
    """scale: samples of a prompt."""
    seconds: float = 8.0
    """scale: how long ideal engines would be busy in one run."""
    repetitions: int = 3
    """scale: runs of each number of engines and group size."""
    idle_seconds: float = 20.0
    """scale: for which a pool is left alone, to see what it takes then."""
    syncs: int = 10
    """scale: of weights of no size."""

    backlog_prompts: int = 100_000
    """backlog: queued prompts."""
    backlog_engines: int = 2
    """backlog: engine actors, whose steps take 2 ms."""

    router_engines: tuple[int, ...] = (1, 32, 1000)
    """operations: engines of the router."""
    router_running: tuple[int, ...] = (0, 10_000)
    """operations: groups that run while others are timed."""
    message_tokens: int = 512
    """operations: tokens of each of the 8 samples whose answer is packed."""

    max_staleness: tuple[int, ...] = (1, 2, 4, 8)
    """async: of the asynchronous loops."""
    seeds: int = 3
    """async: sets of samples."""
    batch_size: int = 64
    """async: samples that a version is made of, and seats of all engines together."""
    batches: int = 16
    """async: versions that every loop makes."""
    median_tokens: int = 24
    """async: of the response lengths, whose 99th percentile is 8 times as much."""
    async_engines: int = 2
    """async: engine actors."""

    output: Annotated[Path | None, tyro.conf.arg(name="json")] = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    console = Console(width=180)
    sections: dict[Section, Callable[[Options, Console], Any]] = {
        "scale": run_scale,
        "backlog": run_backlog,
        "operations": run_operations,
        "async": run_async,
    }
    figures = {name: sections[name](options, console) for name in options.sections}
    if options.output:
        write_json(options.output, "pool", options, figures)


def run_scale(options: Options, console: Console) -> dict[str, Any]:
    load = scale.Load(
        seats=options.seats,
        mean_tokens=options.tokens,
        step_seconds=options.step_seconds,
        seconds=options.seconds,
    )
    figures = scale.measure(
        load, options.engines, options.group_sizes, options.repetitions, options.idle_seconds, options.syncs
    )
    for group_size in options.group_sizes:
        console.print(throughput_table(load, [run for run in figures.runs if run.group_size == group_size]))
    console.print(upkeep_table(figures.upkeep))
    return asdict(figures)


def throughput_table(load: scale.Load, runs: list[scale.Throughput]) -> Table:
    title = (
        f"Groups of {runs[0].group_size}: {load.seats} seats an engine, {load.mean_tokens} tokens a sample, "
        f"{1e3 * load.step_seconds:g} ms a step; CPU of a request, us"
    )
    headings = ("rollouts/s", "range", "ideal", "share", *ROLES)
    table = Table("engines", *headings, title=title, box=SIMPLE_HEAD)
    for num_engines in sorted({run.num_engines for run in runs}):
        turns = [run for run in runs if run.num_engines == num_engines]
        speeds = [run.rollouts_per_second for run in turns]
        table.add_row(
            str(num_engines), f"{median(speeds):.0f}", f"{min(speeds):.0f}-{max(speeds):.0f}", f"{turns[0].ideal:.0f}",
            f"{median(run.share_of_ideal for run in turns):.0%}",
            *(f"{median(run.cpu_microseconds(role) for run in turns):.0f}" for role in ROLES),
        )  # fmt: skip
    return table


def upkeep_table(upkeep: list[scale.Upkeep]) -> Table:
    title = "Upkeep: CPU of idle processes, % of one processor, and syncs of weights of no size"
    headings = ("start, s", "MiB of its own", *ROLES, "sync, ms", *(f"{role}, CPU ms" for role in ROLES))
    table = Table("engines", *headings, title=title, box=SIMPLE_HEAD)
    for row in upkeep:
        table.add_row(
            str(row.num_engines), f"{row.start_seconds:.1f}", f"{row.engine_bytes / MIB:.0f}",
            *(f"{100 * row.idle_cpu_share[role]:.1f}" for role in ROLES), f"{1e3 * median(row.sync_seconds):.1f}",
            *(f"{1e3 * row.sync_cpu_seconds[role]:.1f}" for role in ROLES),
        )  # fmt: skip
    return table


def run_backlog(options: Options, console: Console) -> list[dict[str, Any]]:
    runs = backlog.measure(options.backlog_prompts, options.backlog_engines, options.seats, step_seconds=0.002)
    console.print(backlog_table(runs))
    return [asdict(run) for run in runs]


def backlog_table(runs: list[backlog.Backlog]) -> Table:
    title = f"{runs[0].num_prompts:,} prompts of {backlog.PROMPT_TOKENS} tokens, rollouts dropped as they come; MiB"
    headings = (
        "rollouts/s", "driver before", "peak growth", "bytes a prompt", "growth after 10%", "50%", "100%",
        "coordinator before", "peak growth",
    )  # fmt: skip
    table = Table("prompts as", *headings, title=title, box=SIMPLE_HEAD)
    for run in runs:
        after = [run.driver_growth[place] for place in (0, len(run.driver_growth) // 2 - 1, -1)]
        sizes = [*after, run.coordinator_baseline, run.coordinator_peak - run.coordinator_baseline]
        table.add_row(
            run.kind, f"{run.num_prompts / run.seconds:.0f}", f"{run.driver_baseline / MIB:.1f}",
            f"{(run.driver_peak - run.driver_baseline) / MIB:.1f}", f"{run.bytes_per_prompt:.0f}",
            *(f"{size / MIB:.1f}" for size in sizes),
        )  # fmt: skip
    return table


def run_operations(options: Options, console: Console) -> dict[str, Any]:
    figures = operations.measure(
        options.router_engines, options.router_running, group_size=8, num_tokens=options.message_tokens
    )
    console.print(router_table(figures.router))
    console.print(message_table(figures.messages, options.message_tokens))
    for name, cost in figures.driver.items():
        console.print(f"driver, {name}: {cost:.1f} us a group")
    call = figures.call
    console.print(
        f"a call that does nothing: {call.round_trip:.0f} us there and back; {call.caller_cpu:.0f} us of CPU at the "
        f"caller and {call.actor_cpu:.0f} us at the actor"
    )
    return asdict(figures)


def router_table(costs: list[operations.RouterCost]) -> Table:
    title = f"The router alone, us a group, in calls of {operations.BATCH}"
    table = Table("prompts", "engines", "groups running", "reserve", "assign", "release", title=title, box=SIMPLE_HEAD)
    for cost in costs:
        prompts = "with one beginning" if cost.has_shared_beginning else "distinct"
        figures = [f"{figure:.2f}" for figure in (cost.reserve, cost.assign, cost.release)]
        table.add_row(prompts, f"{cost.num_engines:,}", f"{cost.num_running:,}", *figures)
    return table


def message_table(messages: list[operations.MessageCost], num_tokens: int) -> Table:
    title = (
        f"Messages, a group's share of {operations.BATCH}: a prompt of {operations.PROMPT_TOKENS} tokens, 8 samples of "
        f"{num_tokens}"
    )
    table = Table("message", "bytes", "pack, us", "unpack, us", title=title, box=SIMPLE_HEAD)
    for message in messages:
        table.add_row(message.name, f"{message.num_bytes:.0f}", f"{message.pack:.1f}", f"{message.unpack:.1f}")
    return table


def run_async(options: Options, console: Console) -> dict[str, Any]:
    job = overlap.Job(
        device=overlap.H100_8B,
        num_engines=options.async_engines,
        batch_size=options.batch_size,
        num_batches=options.batches,
        median_tokens=options.median_tokens,
    )
    figures = overlap.measure(job, options.max_staleness, options.seeds)
    console.print(overlap_table(job, figures))
    over = {loop: figures.over_synchronous(loop) for loop in figures.runs}
    return {**asdict(figures), "over_synchronous": over}


def overlap_table(job: overlap.Job, figures: overlap.Overlap) -> Table:
    title = (
        f"{job.num_batches} batches of {job.batch_size} samples, median {job.median_tokens} tokens, on "
        f"{job.num_engines} engines; training {median(figures.training_seconds):.2f} s; {len(figures.training_seconds)}"
        " seeds, medians"
    )
    headings = (
        "samples/s", "/ synchronous", "waits for a batch, s", "a sync, ms", "staleness, mean", "max", "drawn again",
        "tokens computed again",
    )  # fmt: skip
    table = Table("loop", *headings, title=title, box=SIMPLE_HEAD)
    for loop, runs in figures.runs.items():
        ages = [median(run.staleness_means) for run in runs if run.staleness_means]
        table.add_row(
            loop, f"{median(run.samples_per_second for run in runs):.1f}",
            overlap.median_ratio(figures.over_synchronous(loop)),
            f"{median(second for run in runs for second in run.generation_seconds):.2f}",
            f"{1e3 * median(second for run in runs for second in run.sync_seconds):.0f}",
            f"{median(ages):.2f}" if ages else "0", str(max(run.staleness_max for run in runs)),
            f"{sum(run.num_wasted for run in runs)}", f"{median(run.num_recomputed_tokens for run in runs):.0f}",
        )  # fmt: skip
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_pool", description=__doc__))
