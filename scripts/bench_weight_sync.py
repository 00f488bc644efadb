"""Times weight syncs through a RolloutPool beside the memcpys that they need, in the same run.

A sync has checked, digested, shared, verified and packed every weight of the model, in every engine, when it returns.
The bytes must be copied once for the node, into memory that its engines share, and once by every engine, into the
layout that its kernels read: 1 + engines copies, each timed as torch copies the same tensors with all threads.
With --soak it watches memory instead: of sender, engines and weight store, of their segments, and of the object store.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import ray
import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from rollout.shared_segment import close_segment, create_segment
from rollout.weight_sync import WeightSender, WeightStaging
from rollout.weight_transport import SegmentWriter, WeightTransport, aligned
from scripts.timing import model_directory, write_json

if TYPE_CHECKING:
    from rollout import RolloutPool, SyncReport

NUM_WARM_UPS = 3  # the first syncs touch the pages of both generations
SOAK_START = 20  # syncs after which memory must not grow
MAX_GROWTH = 0.01
ARENA = "Ray's object store, touched of what it reserved"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    num_engines: int = 2
    """Engines that take the weights."""
    transports: tuple[WeightTransport, ...] = ("shared_memory", "object_store")
    """How the weights travel; each is timed in a pool of its own."""
    repetitions: int = 15
    """Timed syncs of each, after three that are not."""
    soak: int = 0
    """Syncs in which memory is watched, instead of timing: it must not grow by 1% between the 20th and the last."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    weights = float32_weights(options.model)
    figures = {}
    for transport in options.transports:
        if options.soak:
            figures[transport] = soak(options, weights, transport)
        else:
            figures[transport] = measure(options, weights, transport)
    if options.output:
        num_bytes = sum(tensor.nbytes for tensor in weights.values())
        write_json(options.output, "weight_sync", options, {"num_bytes": num_bytes, "transports": figures})


def measure(options: Options, weights: Mapping[str, torch.Tensor], transport: WeightTransport) -> dict:
    """Seconds of syncs, their phases, pauses and copies; printed as a table."""
    buffers = {name: torch.empty_like(tensor) for name, tensor in weights.items()}
    rows: dict[str, list[float]] = {"sync": [], "pause, longest of an engine": [], "needed copies": []}
    for report in sync_repeatedly(options, weights, transport, NUM_WARM_UPS + options.repetitions):
        copies = (1 + options.num_engines) * seconds_to_copy(weights, buffers)
        if report.policy_version > NUM_WARM_UPS:
            rows["sync"].append(report.seconds)
            rows["pause, longest of an engine"].append(max(report.pause_seconds))
            rows["needed copies"].append(copies)
    rows |= parts(weights, NUM_WARM_UPS + options.repetitions)
    ratios = [sync / copies for sync, copies in zip(rows["sync"], rows["needed copies"], strict=True)]
    title = f"{report.bytes / 1e6:.0f} MB to {options.num_engines} engine(s), {transport}"
    Console().print(figures_table(title, rows, ratios))
    return {"seconds": rows, "sync_over_copies": ratios}


def parts(weights: Mapping[str, torch.Tensor], count: int) -> dict[str, list[float]]:
    """Seconds that this process alone, with all threads, takes for what a sender and an engine do before the switch."""
    shapes = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    num_bytes = sum(aligned(tensor.nbytes) for tensor in weights.values())
    address = create_segment("this one", num_bytes)
    seconds: dict[str, list[float]] = {"alone: check, digest and copy": [], "alone: verify, one engine": []}
    for _ in range(count):
        writer, staging = SegmentWriter(address), WeightStaging()
        start = time.perf_counter()
        buckets = list(WeightSender(shapes).buckets(weights, writer.room))
        written = time.perf_counter()
        for bucket in buckets:
            staging.add("alone", bucket)
        seconds["alone: check, digest and copy"].append(written - start)
        seconds["alone: verify, one engine"].append(time.perf_counter() - written)
    close_segment(address)
    return {name: values[NUM_WARM_UPS:] for name, values in seconds.items()}


def soak(options: Options, weights: Mapping[str, torch.Tensor], transport: WeightTransport) -> dict:
    """Bytes of memory after the 20th and the last of many syncs; printed as a table, and asserted not to grow."""
    assert options.soak > SOAK_START, f"--soak {options.soak} must be more than {SOAK_START}"
    samples = {}
    with make_pool(options, transport) as pool:
        for report in sync_repeatedly(options, weights, transport, options.soak, pool):
            if report.policy_version in (SOAK_START, options.soak):
                samples[report.policy_version] = memory_of(pool)
    first, last = samples[SOAK_START], samples[options.soak]
    table = Table("", f"MiB after {SOAK_START}", f"after {options.soak}", "growth", box=SIMPLE_HEAD, title=transport)
    for name, before in first.items():
        growth = f"{(last[name] - before) / before:+.2%}" if before else ""
        table.add_row(name, f"{before / 2**20:.1f}", f"{last[name] / 2**20:.1f}", growth)
    Console().print(table)
    # the object store's pages are touched one by one until all that Ray reserved at its start have been: no growth
    ours = {name: before for name, before in first.items() if name != ARENA}
    grown = {name for name, before in ours.items() if last[name] - before > MAX_GROWTH * before}
    assert not grown, f"memory grew by more than {MAX_GROWTH:.0%}: {', '.join(sorted(grown))}"
    return {"bytes": samples}


def sync_repeatedly(
    options: Options,
    weights: Mapping[str, torch.Tensor],
    transport: WeightTransport,
    count: int,
    pool: RolloutPool | None = None,
) -> Iterator[SyncReport]:
    """The reports of so many syncs, of versions 1 to `count`."""
    if pool is None:
        with make_pool(options, transport) as pool:
            yield from sync_repeatedly(options, weights, transport, count, pool)
        return
    for version in range(1, count + 1):
        report = pool.sync_weights(weights, version)
        assert report.is_lockstep
        yield report


def make_pool(options: Options, transport: WeightTransport) -> RolloutPool:
    from rollout import EngineConfig, RolloutPool

    return RolloutPool(EngineConfig(options.model), num_engines=options.num_engines, weight_transport=transport)


def memory_of(pool: RolloutPool) -> dict[str, int]:
    """Bytes by whom they belong to. Shared memory is part of the resident size of everybody who has mapped it."""
    stores = ray.get(pool.coordinator.weight_stores.remote())
    infos = ray.get([store.info.remote() for store in stores.values()])
    memory = {"sender, resident": psutil.Process().memory_info().rss}
    for i, info in enumerate(pool.engine_infos):
        memory[f"engine {i}, resident"] = psutil.Process(info.pid).memory_info().rss
    for info in infos:
        memory["weight store, resident"] = psutil.Process(info.pid).memory_info().rss
        memory["weight store, segments"] = info.num_bytes
    memory[ARENA] = object_store_bytes()
    return memory


def object_store_bytes() -> int:
    """What the object store of the Ray that this process started takes of /dev/shm (its file there has no name)."""
    files = {}
    for process in psutil.Process().children(recursive=True):
        for link in Path(f"/proc/{process.pid}/fd").glob("*"):
            with contextlib.suppress(OSError):
                if "plasma" in os.readlink(link) and "/dev/shm" in os.readlink(link):
                    files[link.stat().st_ino] = 512 * link.stat().st_blocks
    return sum(files.values())


def float32_weights(model: str) -> dict[str, torch.Tensor]:
    """The model's weights as a trainer holds them."""
    from engine.checkpoint import iter_weights

    return {name: tensor.float().contiguous() for name, tensor in iter_weights(model_directory(model))}


def seconds_to_copy(source: Mapping[str, torch.Tensor], target: Mapping[str, torch.Tensor]) -> float:
    start = time.perf_counter()
    for name, tensor in source.items():
        target[name].copy_(tensor)
    return time.perf_counter() - start


def figures_table(title: str, rows: dict[str, list[float]], ratios: list[float]) -> Table:
    table = Table("", "ms, min", "median", "max", title=title, box=SIMPLE_HEAD)
    for name, values in rows.items():
        figures = [f"{1e3 * figure:.0f}" for figure in (min(values), statistics.median(values), max(values))]
        table.add_row(name, *figures)
    figures = (min(ratios), statistics.median(ratios), max(ratios))
    table.add_row("sync / needed copies", *(f"{ratio:.2f}" for ratio in figures))
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_weight_sync", description=__doc__))
