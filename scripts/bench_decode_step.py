"""Times a whole decode step against the sum of its floors, alone and beside a process that keeps a core busy.

The floor of a step is that of its matrix products and of attention: for each the longer of its arithmetic at the rate
of torch's own 2048^3 product in the same number format, and the bytes it must read at the speed at which torch adds up
a large tensor. What a step takes beyond its products and attention is Python, packing, row-wise operations, sampling
and dispatch.

Beside a busy process a step may take as much longer as that process takes of the cores; `excess` is what comes on top.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.config import available_cores
from engine.model import PackedLinear
from kernels.recording import Recording
from scripts.timing import call_seconds, read_bandwidth, write_json

Numerics = Literal["float32", "bfloat16", "bfloat16-dot"]
WARM_STEPS = 24  # past the prompts' last blocks and the recording of the step
KV_CACHE_BYTES = 2**30  # room for every request to the end: nothing is preempted


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    numerics: tuple[Numerics, ...] = ("float32", "bfloat16", "bfloat16-dot")
    """Profiles to time."""
    rows: tuple[int, ...] = (1, 8, 64)
    """Requests that decode together."""
    prompt_length: int = 40
    """Tokens of each prompt."""
    steps: int = 40
    """Steps timed; the median counts."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this machine can do, measured in this run."""

    flops_per_second: dict[str, float]  # by profile
    bytes_per_second: float


def main(options: Options) -> None:
    torch.set_num_threads(available_cores())
    limits = measure_limits()
    console = Console(width=120)
    rates = ", ".join(f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in limits.flops_per_second.items())
    console.print(f"torch's product: {rates}; read {limits.bytes_per_second / 1e9:.1f} GB/s")
    rows = [measure(options, limits, numerics, count) for numerics in options.numerics for count in options.rows]
    console.print(figures_table(rows))
    if options.output:
        facts = {"gflops": limits.flops_per_second, "read_bytes_per_second": limits.bytes_per_second}
        write_json(options.output, "decode_step", options, {"limits": facts, "steps": rows})


def measure_limits() -> Limits:
    rates = {}
    for numerics, dtype in (("float32", torch.float32), ("bfloat16", torch.float32), ("bfloat16-dot", torch.bfloat16)):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        rates[numerics] = 2 * 2048**3 / min(call_seconds(lambda a=a, b=b: torch.mm(a, b), 1.0))
    return Limits(flops_per_second=rates, bytes_per_second=read_bandwidth())


def measure(options: Options, limits: Limits, numerics: Numerics, num_rows: int) -> dict[str, str | float]:
    """Milliseconds of a step, of what it is made of, and of its floor; beside a busy process as well."""
    engine = decoding_engine(options, numerics, num_rows)
    alone = statistics.median(step_seconds(engine, options.steps))
    linear, attention = parts_seconds(engine, num_rows)
    head = head_seconds(engine, num_rows)
    context = options.prompt_length + WARM_STEPS + options.steps // 2
    floor = floor_seconds(engine, limits, numerics, num_rows, context)
    busy, lost_share = beside_a_busy_process(engine, options.steps)
    return {
        "numerics": numerics,
        "rows": num_rows,
        "step_ms": 1e3 * alone,
        "floor_ms": 1e3 * floor,
        "linear_ms": 1e3 * linear,
        "head_ms": 1e3 * head,
        "attention_ms": 1e3 * attention,
        "rest_ms": 1e3 * (alone - linear - head - attention),
        "busy_step_ms": 1e3 * busy,
        "lost_core_share": lost_share,
        "excess": busy / alone * (1 - lost_share),
    }


def decoding_engine(options: Options, numerics: Numerics, num_rows: int) -> LLMEngine:
    """An engine whose requests all decode, far enough along that steps are recorded and memory has been touched."""
    engine = LLMEngine(
        EngineConfig(options.model, numerics=numerics, kv_cache_memory_bytes=KV_CACHE_BYTES, max_model_len=1024)
    )
    draw = random.Random(0)
    params = SamplingParams(max_tokens=2 * options.steps + 2 * WARM_STEPS, ignore_eos=True, seed=1)
    for number in range(num_rows):
        prompt = [draw.randrange(3, engine.model_config.vocab_size) for _ in range(options.prompt_length)]
        engine.add_request(f"request-{number}", prompt, params)
    while engine.scheduler.waiting:
        engine.step()
    step_seconds(engine, WARM_STEPS)
    return engine


def step_seconds(engine: LLMEngine, num_steps: int) -> list[float]:
    times = []
    for _ in range(num_steps):
        start = time.perf_counter()
        engine.step()
        times.append(time.perf_counter() - start)
    return times


def parts_seconds(engine: LLMEngine, num_rows: int) -> tuple[float, float]:
    """What the linear layers and attention of the recorded step take, each run again by themselves."""
    recording = engine.model_runner.steps.recording(num_rows)
    assert recording is not None, "the step was not recorded"
    return best(recording.only("ls_linear", "ls_round_rows")), best(recording.only("ls_attention", "ls_kv_store"))


def best(recording: Recording) -> float:
    return statistics.median(call_seconds(recording.run, 0.3))


def head_seconds(engine: LLMEngine, num_rows: int) -> float:
    from kernels.logprobs import vocab_stats

    head, is_dot = engine.model_runner.model.lm_head, engine.model_runner.ops.profile.is_dot
    hidden, temperature = torch.randn(num_rows, head.num_inputs), torch.ones(num_rows)
    calls = call_seconds(lambda: vocab_stats(hidden, head.packed, head.num_outputs, temperature, is_dot), 0.3)
    return statistics.median(calls)


def floor_seconds(engine: LLMEngine, limits: Limits, numerics: Numerics, num_rows: int, context: int) -> float:
    """The sum of the floors of all matrix products and of attention."""
    model, config = engine.model_runner.model, engine.model_config
    products = {id(m): m for m in model.modules() if isinstance(m, PackedLinear)}  # a tied head counts once
    total = 0.0
    for matrix in products.values():
        flops = 2.0 * num_rows * matrix.num_outputs * matrix.num_inputs
        total += max(flops / limits.flops_per_second[numerics], matrix.packed.nbytes / limits.bytes_per_second)
    kv_values = 2 * config.num_layers * config.num_kv_heads * config.head_dim * context * num_rows
    return total + kv_values * engine.model_runner.kv_storage.element_size() / limits.bytes_per_second


def beside_a_busy_process(engine: LLMEngine, num_steps: int) -> tuple[float, float]:
    """(median seconds of a step, share of all core time that a busy process took meanwhile)."""
    process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        step_seconds(engine, WARM_STEPS // 2)
        taken, start = core_seconds(process.pid), time.perf_counter()
        seconds = statistics.median(step_seconds(engine, num_steps // 2))
        elapsed = time.perf_counter() - start
        return seconds, (core_seconds(process.pid) - taken) / elapsed / available_cores()
    finally:
        process.kill()
        process.wait()


def core_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def figures_table(rows: Sequence[dict]) -> Table:
    names = ("linear", "head", "attention", "rest")
    table = Table("", "rows", "step ms", "of floor", *names, "busy: step ms", "core lost", "excess", box=SIMPLE_HEAD)
    for row in rows:
        step = [f"{row['step_ms']:.1f}", f"{row['floor_ms'] / row['step_ms']:.0%}"]
        parts = [f"{row[f'{name}_ms']:.1f}" for name in names]
        busy = [f"{row['busy_step_ms']:.1f}", f"{row['lost_core_share']:.0%}", f"{row['excess']:.2f}"]
        table.add_row(row["numerics"], str(row["rows"]), *step, *parts, *busy)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_decode_step", description=__doc__))
