"""Times each kernel against its floor and against torch, alone and beside a process that keeps a core busy.

The floor of an operation is the longer of two times, by limits measured in the same run: its arithmetic at the rate of
torch's own 2048^3 product of the profile's operands, and the bytes it must read at the speed at which torch adds up a
large tensor. (Where data fits the caches, or a product beats torch's, more than the floor is possible.) Weights are
rotated over more than the caches hold, so they come from memory as they do in a model.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import rms_norm as torch_rms_norm
from torch.nn.functional import scaled_dot_product_attention, silu

import kernels
from engine.config import available_cores
from kernels.activation import silu_and_mul
from kernels.attention import paged_attention
from kernels.linear import linear, pack_rows, packed_shape
from kernels.logprobs import vocab_stats
from kernels.profiles import PROFILES, Profile, get_profile
from kernels.rms_norm import rms_norm
from kernels.storage import empty_storage
from kernels.truncated import DrawOptions, IdLists, truncated_sample
from scripts.timing import busy_process, call_seconds, read_bandwidth, write_json

ROTATED_BYTES = 96 * 2**20
BLOCK_SIZE = 16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM = 9, 3, 64


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and for how long."""

    numerics: tuple[str, ...] = tuple(PROFILES)
    """Profiles to time."""
    num_threads: int | None = None
    """Threads of our kernels and of torch; None takes every core."""
    rows: tuple[int, ...] = (1, 8, 32, 64, 512)
    """Numbers of rows for the linear layers."""
    seconds: float = 0.25
    """Time spent on each figure. The best call counts, and beside a busy process the median."""
    busy: bool = True
    """Time everything a second time beside a busy process."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One operation on one shape, in one profile."""

    name: str
    profile: Profile
    ours: Callable[[], object]
    theirs: Callable[[], object]
    flops: float
    num_bytes: float  # that must be read


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What this machine can do, measured in this run."""

    flops_per_second: dict[torch.dtype, float]  # by the type of both operands
    bytes_per_second: float

    def floor(self, case: Case) -> float:
        """Seconds that the case takes at least."""
        rate = self.flops_per_second[torch.bfloat16 if case.profile.is_dot else torch.float32]
        return max(case.flops / rate, case.num_bytes / self.bytes_per_second)


def main(options: Options) -> None:
    num_threads = options.num_threads or available_cores()
    torch.set_num_threads(num_threads)
    kernels.set_num_threads(num_threads)
    console = Console(width=130)
    with torch.inference_mode():
        limits = measure_limits(options.seconds)
        gflops = {str(dtype): rate / 1e9 for dtype, rate in limits.flops_per_second.items()}
        console.print(
            f"{num_threads} threads, {kernels.instruction_set()}: product "
            + ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in gflops.items())
            + f", read {limits.bytes_per_second / 1e9:.1f} GB/s"
        )
        profiles = [get_profile(name) for name in options.numerics]
        rows = [measure(case, limits, options) for case in make_cases(profiles, options.rows)]
    console.print(figures_table(rows, options.busy))
    if options.output:
        limit_figures = {"gflops": gflops, "read_gb_per_second": limits.bytes_per_second / 1e9}
        write_json(options.output, "kernels", options, {"limits": limit_figures, "kernels": rows})


def measure_limits(seconds: float) -> Limits:
    rates = {}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = torch.randn(2048, 2048).to(dtype), torch.randn(2048, 2048).to(dtype)
        rates[dtype] = 2 * 2048**3 / best_seconds(lambda a=a, b=b: torch.mm(a, b), 4 * seconds)
    return Limits(flops_per_second=rates, bytes_per_second=read_bandwidth(4 * seconds))


def measure(case: Case, limits: Limits, options: Options) -> dict[str, str | float]:
    """Microseconds of ours and torch's, alone and beside a busy process, and the floor's."""
    row: dict[str, str | float] = {
        "name": case.name,
        "numerics": case.profile.name,
        "floor_us": 1e6 * limits.floor(case),
    }
    row["ours_us"] = 1e6 * best_seconds(case.ours, options.seconds)
    row["torch_us"] = 1e6 * best_seconds(case.theirs, options.seconds)
    if options.busy:
        with busy_process():
            row["ours_busy_us"] = 1e6 * statistics.median(call_seconds(case.ours, options.seconds))
            row["torch_busy_us"] = 1e6 * statistics.median(call_seconds(case.theirs, options.seconds))
    return row


def best_seconds(call: Callable[[], object], seconds: float) -> float:
    return min(call_seconds(call, seconds))


def make_cases(profiles: Sequence[Profile], row_counts: Sequence[int]) -> Iterator[Case]:
    """The operations of SmolLM2-135M: 9 query and 3 key-value heads of 64, widths 576 and 1536."""
    layers = {"q, k, v": (960, 576), "attention output": (576, 576), "gate, up": (3072, 576), "down": (576, 1536)}
    for profile in profiles:
        for (name, (num_outputs, width)), num_rows in itertools.product(layers.items(), row_counts):
            yield linear_case(profile, name, num_outputs, width, num_rows)
        for num_rows in row_counts:
            yield head_case(profile, 49152, 576, num_rows)
    for profile in {profile.kv_dtype: profile for profile in reversed(profiles)}.values():
        for num_requests, context in ((32, 512), (32, 2048), (1, 8192)):
            yield attention_case(profile, f"decode of {num_requests}", num_requests, 1, context)
        for length in (512, 4096):
            yield attention_case(profile, "prefill", 1, length, length)
    float32 = get_profile("float32")
    for num_rows in (64, 512):
        yield rms_norm_case(float32, num_rows, 576)
        yield silu_case(float32, num_rows, 1536)
    yield truncated_case(float32, 64, 49152)


def rotating(make: Callable[[], torch.Tensor]) -> Iterator[torch.Tensor]:
    """Copies of a weight in turn, more of them than the caches hold."""
    first = make()
    copies = [first, *(make() for _ in range(ROTATED_BYTES // first.nbytes))]
    return itertools.cycle(copies)


def packed_weight(profile: Profile, num_outputs: int, width: int) -> torch.Tensor:
    dtype = profile.weight_dtype
    packed = empty_storage(*packed_shape(num_outputs, width, dtype), dtype=dtype).zero_()
    pack_rows(packed, torch.randn(num_outputs, width))
    return packed


def linear_case(profile: Profile, name: str, num_outputs: int, width: int, num_rows: int) -> Case:
    """torch's side has x and the weight in the profile's type of weights."""
    x, is_dot, dtype = torch.randn(num_rows, width), profile.is_dot, profile.weight_dtype
    packed = rotating(lambda: packed_weight(profile, num_outputs, width))
    plain, their_x = rotating(lambda: torch.randn(num_outputs, width).to(dtype)), x.to(dtype)
    return Case(
        name=f"{name} {width} -> {num_outputs}, {num_rows} rows",
        profile=profile,
        ours=lambda: linear(x, next(packed), num_outputs, is_dot=is_dot),
        theirs=lambda: torch_linear(their_x, next(plain)),
        flops=2.0 * num_rows * num_outputs * width,
        num_bytes=dtype.itemsize * num_outputs * width,
    )


def head_case(profile: Profile, vocab_size: int, width: int, num_rows: int) -> Case:
    """The output head with its log-sum-exp; torch's side writes the logits out and reduces them."""
    x, temperature, dtype = torch.randn(num_rows, width), torch.ones(num_rows), profile.weight_dtype
    packed = packed_weight(profile, vocab_size, width)
    plain, their_x = torch.randn(vocab_size, width).to(dtype), x.to(dtype)
    return Case(
        name=f"head and log-sum-exp {width} -> {vocab_size}, {num_rows} rows",
        profile=profile,
        ours=lambda: vocab_stats(x, packed, vocab_size, temperature, profile.is_dot),
        theirs=lambda: torch_linear(their_x, plain).float().logsumexp(-1),
        flops=2.0 * num_rows * vocab_size * width,
        num_bytes=dtype.itemsize * vocab_size * width,
    )


def rms_norm_case(profile: Profile, num_rows: int, width: int) -> Case:
    x, weight = torch.randn(num_rows, width), torch.ones(width)
    return Case(
        name=f"RMSNorm {width}, {num_rows} rows",
        profile=profile,
        ours=lambda: rms_norm(x, weight, 1e-5),
        theirs=lambda: torch_rms_norm(x, (width,), weight, 1e-5),
        flops=4.0 * x.numel(),
        num_bytes=x.nbytes,
    )


def silu_case(profile: Profile, num_rows: int, width: int) -> Case:
    x = torch.randn(num_rows, 2 * width)
    return Case(
        name=f"silu-and-mul {width}, {num_rows} rows",
        profile=profile,
        ours=lambda: silu_and_mul(x),
        theirs=lambda: silu(x[:, :width]) * x[:, width:],
        flops=20.0 * num_rows * width,
        num_bytes=x.nbytes,
    )


def truncated_case(profile: Profile, num_rows: int, vocab_size: int) -> Case:
    """top_p = 0.95 at temperature 0.8 from given logits, with log-probabilities and kept mass; torch's side sorts."""
    logits, number = 3 * torch.randn(num_rows, vocab_size), torch.arange(num_rows)
    draws = torch.stack([number, number, number, 0 * number, 0 * number])
    nothing = IdLists(offsets=torch.zeros(num_rows + 1, dtype=torch.int64), ids=torch.empty(0, dtype=torch.int32))
    numbers = torch.tensor([0.8, 1.0, 0.0, 0.0, 0.0, 0.0, 0.95, 0.0], dtype=torch.float64)
    options = DrawOptions(
        numbers=numbers[:, None].expand(-1, num_rows).contiguous(), seen=nothing, counts=torch.empty(0).int(),
        biased=nothing, bias=torch.empty(0), masked=nothing, allowed=nothing,
    )  # fmt: skip

    def theirs() -> torch.Tensor:
        probabilities, ids = (logits / 0.8).softmax(-1).sort(descending=True)
        probabilities[probabilities.cumsum(-1) - probabilities > 0.95] = 0.0
        return ids.gather(1, probabilities.multinomial(1))

    return Case(
        name=f"top-p of {vocab_size}, {num_rows} rows",
        profile=profile,
        ours=lambda: truncated_sample(logits, draws, options, 0),
        theirs=theirs,
        flops=20.0 * logits.numel(),
        num_bytes=logits.nbytes,
    )


def attention_case(profile: Profile, name: str, num_requests: int, num_rows: int, context: int) -> Case:
    """The last `num_rows` of `context` positions of each request; torch attends to dense keys and values."""
    dtype, blocks_each = profile.kv_dtype, context // BLOCK_SIZE
    shape = (num_requests * blocks_each, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE)
    keys = empty_storage(*shape, dtype=dtype).normal_()
    values = empty_storage(*shape[:2], BLOCK_SIZE, HEAD_DIM, dtype=dtype).normal_()
    tables = torch.randperm(shape[0]).int().reshape(num_requests, blocks_each)
    starts = num_rows * torch.arange(num_requests + 1, dtype=torch.int32)
    lengths = torch.full((num_requests,), context, dtype=torch.int32)
    q = torch.randn(num_requests * num_rows, NUM_HEADS, HEAD_DIM)
    dense_q = torch.randn(num_requests, NUM_HEADS, num_rows, HEAD_DIM).to(dtype)
    dense_k, dense_v = torch.randn(2, num_requests, NUM_KV_HEADS, context, HEAD_DIM).to(dtype)
    pairs = num_requests * NUM_HEADS * (context if num_rows == 1 else context * (context + 1) / 2)
    return Case(
        name=f"attention, {name} at context {context}",
        profile=profile,
        ours=lambda: paged_attention(q, keys, values, tables, starts, lengths, HEAD_DIM**-0.5),
        theirs=lambda: scaled_dot_product_attention(dense_q, dense_k, dense_v, is_causal=num_rows > 1, enable_gqa=True),
        flops=4.0 * pairs * HEAD_DIM,
        num_bytes=keys.nbytes + values.nbytes,
    )


def figures_table(rows: list[dict], has_busy: bool) -> Table:
    """A line for each case; `of floor` is the share of the floor's speed that ours reaches."""
    columns = ["", "numerics", "floor us", "ours us", "of floor", "torch / ours"] + [
        "busy: ours us",
        "torch / ours",
    ] * has_busy
    table = Table(*columns, box=SIMPLE_HEAD)
    for row in rows:
        cells = [row["name"], row["numerics"], f"{row['floor_us']:.0f}", f"{row['ours_us']:.0f}"]
        cells += [f"{row['floor_us'] / row['ours_us']:.0%}", f"{row['torch_us'] / row['ours_us']:.2f}"]
        if has_busy:
            cells += [f"{row['ours_busy_us']:.0f}", f"{row['torch_busy_us'] / row['ours_busy_us']:.2f}"]
        table.add_row(*cells)
    return table


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_kernels", description=__doc__))
