"""Times weight syncs through a RolloutPool beside plain copies of the same bytes in the same run.

A sync has checked, digested, shared, verified and packed every weight of the model, in every engine, when it returns.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scripts.timing import model_directory, write_json

NUM_WARM_UPS = 2  # the first syncs map the object store's pages


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    num_engines: int = 1
    """Engines that take the weights."""
    repetitions: int = 9
    """Timed syncs, after two that are not."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    from rollout import EngineConfig, RolloutPool

    weights = float32_weights(options.model)
    num_bytes = sum(tensor.nbytes for tensor in weights.values())
    buffers = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    syncs, copies, pauses = [], [], []
    with RolloutPool(EngineConfig(options.model), num_engines=options.num_engines) as pool:
        for version in range(1, NUM_WARM_UPS + options.repetitions + 1):
            two_copies = 2 * seconds_to_copy(weights, buffers)
            report = pool.sync_weights(weights, version)
            assert set(report.policy_versions) == {version}
            if version > NUM_WARM_UPS:
                copies.append(two_copies)
                syncs.append(report.seconds)
                pauses.append(max(report.pause_seconds))
    ratios = [sync / copy for sync, copy in zip(syncs, copies, strict=True)]
    rows = {"sync": syncs, "pause of an engine": pauses, "two copies": copies}
    Console().print(figures_table(f"{num_bytes / 1e6:.0f} MB to {options.num_engines} engine(s)", rows, ratios))
    if options.output:
        figures = {"num_bytes": num_bytes, "seconds": rows, "sync_over_two_copies": ratios}
        write_json(options.output, "weight_sync", options, figures)


def float32_weights(model: str) -> dict[str, torch.Tensor]:
    """The model's weights as a trainer holds them."""
    from engine.checkpoint import iter_weights

    return {name: tensor.float().contiguous() for name, tensor in iter_weights(model_directory(model))}


def seconds_to_copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    for name, tensor in source.items():
        target[name].copy_(tensor)
    return time.perf_counter() - start


def figures_table(title: str, rows: dict[str, list[float]], ratios: list[float]) -> Table:
    table = Table("", "ms, min", "median", "max", title=title, box=SIMPLE_HEAD)
    for name, values in rows.items():
        figures = [f"{1e3 * figure:.0f}" for figure in (min(values), statistics.median(values), max(values))]
        table.add_row(name, *figures)
    table.add_row("sync / two copies", *(f"{r:.2f}" for r in (min(ratios), statistics.median(ratios), max(ratios))))
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_weight_sync", description=__doc__))
