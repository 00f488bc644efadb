"""Measures what a trainer rank holds and what one step takes at most: replicated, sharded, and with layers recomputed.

Every setting runs in processes of its own, one a rank, on the same micro-batch. "rest" is what the process has before
a step beyond the tensors that are counted (Python, torch, the tokenizer); "step" what it holds more at the worst
moment of forward, backward and the optimiser's move.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scripts.timing import write_json

MIB = 2**20
# glibc keeps freed memory for later; what is measured here should be what is in use
HONEST_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "2"}
SETTINGS = (
    {"num_ranks": 1, "parallelism": "ddp", "gradient_checkpointing": False},
    {"num_ranks": 1, "parallelism": "ddp", "gradient_checkpointing": True},
    {"num_ranks": 2, "parallelism": "ddp", "gradient_checkpointing": True},
    {"num_ranks": 2, "parallelism": "fsdp", "gradient_checkpointing": True},
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to measure."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    numerics: str = "float32"
    """Profile of the forward."""
    num_rows: int = 1024
    """Rows of the micro-batch; the second half is trained."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    results = [{**setting, "ranks": run(options, setting)} for setting in SETTINGS]
    show(options, results)
    if options.output:
        write_json(options.output, "trainer_memory", options, {"settings": results})


def run(options: Options, setting: dict[str, Any]) -> list[dict[str, float]]:
    """What each rank of a setting measured."""
    os.environ.update(HONEST_MALLOC)  # read by the ranks' processes as they begin
    context = multiprocessing.get_context("spawn")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    answers = [context.Pipe(duplex=False) for _ in range(setting["num_ranks"])]
    processes = [
        context.Process(target=measure_rank, args=(options, setting, rank, port, sender))
        for rank, (_, sender) in enumerate(answers)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        if process.exitcode:
            raise RuntimeError(f"a rank of {setting} ended with exit code {process.exitcode}")
    return [receiver.recv() for receiver, _ in answers]


def measure_rank(options: Options, setting: dict[str, Any], rank: int, port: int, answer: Any) -> None:
    """One rank's process: its environment first, then everything that imports accelerate."""
    places = {"RANK": rank, "WORLD_SIZE": setting["num_ranks"], "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({name: str(value) for name, value in (places | {"MASTER_PORT": port}).items()})
    os.environ["OMP_NUM_THREADS"] = "1"
    from trainers import Policy

    policy = Policy(
        options.model,
        numerics=options.numerics,
        num_threads=1,
        parallelism=setting["parallelism"],
        gradient_checkpointing=setting["gradient_checkpointing"],
    )
    train(policy, num_rows=2)  # gradients and moments come into being, and what is imported on the way
    train(policy, num_rows=2)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    start = time.perf_counter()
    train(policy, options.num_rows)
    figures = {"step": memory("VmHWM") - before, "seconds": time.perf_counter() - start}
    held = held_bytes(policy)
    answer.send({**held, "rest": before - sum(held.values()) + held["gradients"], **figures})


def train(policy: Any, num_rows: int) -> None:
    from trainers.batch import pack_tokens
    from trainers.losses import LossOutput

    ids = [(7 * i) % policy.model.config.vocab_size for i in range(num_rows + 1)]
    batch = pack_tokens([ids[: num_rows // 2]], [[ids[num_rows // 2 :]]])
    policy.forward_backward(batch, lambda logprobs, _: LossOutput(loss=-logprobs.mean(), metrics={}))
    policy.optim_step()


def held_bytes(policy: Any) -> dict[str, float]:
    """Of packed storage, masters, a step's gradients and moments."""
    from torch.distributed.tensor import DTensor

    def count(tensors: Any) -> float:
        return sum((t.to_local() if isinstance(t, DTensor) else t).nbytes for t in tensors)

    masters = count(policy.model.parameters())
    packed = count(module.packed for module in policy.model.modules() if hasattr(module, "packed"))
    states = policy.optimizer.optimizer.state.values()
    moments = count(state[key] for state in states for key in ("exp_avg", "exp_avg_sq"))
    return {"packed": packed, "masters": masters, "gradients": masters, "moments": moments}


def memory(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


def show(options: Options, results: list[dict[str, Any]]) -> None:
    table = Table(title=f"MiB of rank 0, {options.num_rows} rows, {options.numerics}", box=SIMPLE_HEAD)
    columns = ("packed", "masters", "gradients", "moments", "rest", "step")
    for name in ("ranks", "parallelism", "recomputed", *columns, "seconds"):
        table.add_column(name, justify="right")
    for result in results:
        figures = result["ranks"][0]
        row = [str(result["num_ranks"]), result["parallelism"], "yes" if result["gradient_checkpointing"] else "no"]
        table.add_row(*row, *(f"{figures[name] / MIB:.0f}" for name in columns), f"{figures['seconds']:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
