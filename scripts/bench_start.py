"""Times the start of a run: engines and trainer one after the other, and beside each other.

`python -m scripts.bench_start`: until every actor has its model, on a Ray that runs; the two orders take turns.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import ray
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine import EngineConfig
from engine.config import available_cores
from rollout import RolloutPool, cluster
from scripts.timing import write_json
from trainers import GRPOConfig, GRPOTrainer
from trainers.trainer_actor import start_trainer_actor

ORDERS = {"one after the other": True, "beside each other": False}  # whether the pool is waited for


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is started."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    num_engines: int = 1
    """Engines of the pool."""
    num_rounds: int = 5
    """Starts in each order."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    console = Console(width=100)
    has_started_ray = cluster.connect(weights_bytes=0, num_cpus=available_cores())
    try:
        seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
        start(options, is_waited_for=True)  # whose weights are then in the page cache
        for number in range(options.num_rounds):
            console.print(f"round {number + 1} of {options.num_rounds}", style="dim")
            for order, is_waited_for in ORDERS.items():
                seconds[order].append(start(options, is_waited_for))
    finally:
        if has_started_ray:
            cluster.disconnect()
    console.print(table(seconds, options))
    if options.output:
        write_json(options.output, "start", options, {"seconds": seconds})


def start(options: Options, is_waited_for: bool) -> float:
    """Seconds until pool and trainer are ready."""
    begin = time.perf_counter()
    config = EngineConfig(options.model, num_threads=1)
    with RolloutPool(config, num_engines=options.num_engines, wait_until_ready=is_waited_for) as pool:
        trainer = start_trainer_actor(GRPOTrainer.actor_class, GRPOConfig(num_threads=1), pool.handle())
        ray.get(trainer.environment.remote())
        pool.wait_until_ready()
        seconds = time.perf_counter() - begin
        ray.kill(trainer)
    return seconds


def table(seconds: dict[str, list[float]], options: Options) -> Table:
    title = f"start of {options.num_engines} engines and a trainer, {options.model}"
    shown = Table("order", "median seconds", "least", "most", "ratio", title=title, box=SIMPLE_HEAD)
    base = statistics.median(seconds[next(iter(ORDERS))])
    for order, taken in seconds.items():
        median = statistics.median(taken)
        shown.add_row(order, f"{median:.1f}", f"{min(taken):.1f}", f"{max(taken):.1f}", f"{median / base:.2f}")
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_start", description=__doc__))
