"""Times rollouts: Lockstep's engine beside transformers, and vLLM where another environment has it.

Every turn brings new prompts, so that no prefix cache helps anybody but in the load that asks for it; contenders take
turns within it.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from scripts.timing import (
    Contender,
    busy_process,
    model_directory,
    read_bandwidth,
    results_table,
    started,
    summary,
    write_json,
)

Numerics = Literal["float32", "bfloat16", "bfloat16-dot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """A job that every contender gets in every turn."""

    name: str
    num_prompts: int
    group_size: int
    max_tokens: int
    is_hot: bool = False  # the prompts of the load before, once more
    is_busy: bool = False  # beside a process that keeps a core busy

    @property
    def num_tokens(self) -> int:
        return self.num_prompts * self.group_size * self.max_tokens

    @property
    def title(self) -> str:
        return f"{self.name}: {self.num_prompts} prompts x {self.group_size} samples x {self.max_tokens} tokens"


LOADS = (
    Load(name="groups, prefix cache cold", num_prompts=8, group_size=8, max_tokens=32),
    Load(name="groups, prefix cache hot", num_prompts=8, group_size=8, max_tokens=32, is_hot=True),
    Load(name="distinct prompts", num_prompts=64, group_size=1, max_tokens=32),
    Load(name="one at a time", num_prompts=1, group_size=1, max_tokens=64),
    Load(name="groups, beside a busy process", num_prompts=8, group_size=8, max_tokens=32, is_busy=True),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    numerics: tuple[Numerics, ...] = ("float32", "bfloat16", "bfloat16-dot")
    """Lockstep's profiles to time."""
    repetitions: int = 4
    """Timed turns, after one that is not."""
    peer_python: str | None = None
    """The Python of an environment that has vLLM, to time it as well."""
    peer_dtypes: tuple[str, ...] = ("bfloat16",)
    """Number formats in which the others run."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


Results = dict[str, dict[str, list[float]]]
"""Tokens per second by name of the load and contender, in order of the turns."""


def main(options: Options, loads: Sequence[Load] = LOADS) -> None:
    console = Console()
    contenders, ours = make_contenders(options), [our_name(numerics) for numerics in options.numerics]
    results: Results = {load.name: {contender.name: [] for contender in contenders} for load in loads}
    weight_bytes: dict[str, int] = {}
    with started(contenders, console):
        tokenizer = load_tokenizer(options.model)
        for turn in range(options.repetitions + 1):
            speeds = run_turn(contenders, loads, tokenizer, turn, weight_bytes)
            console.print(f"turn {turn} of {options.repetitions}" + " (not counted)" * (turn == 0), style="dim")
            if turn > 0:
                collect(results, speeds)
    for load in loads:
        console.print(results_table(load.title, "tokens/s", results[load.name], ours, digits=0))
    shares = floor_shares(results, loads, weight_bytes)
    for name, share in shares.items():
        console.print(f"{name}, one at a time: {share:.0%} of the speed at which its weights can be read")
    if options.output:
        figures = {load.name: summary(results[load.name], ours) for load in loads}
        write_json(options.output, "rollout", options, {"tokens_per_second": figures, "share_of_read_floor": shares})


def our_name(numerics: str) -> str:
    return f"Lockstep {numerics}"


def make_contenders(options: Options) -> list[Contender]:
    directory = model_directory(options.model)
    contenders = [
        Contender(our_name(numerics), "lockstep_rollout.py", options.model, numerics, is_ours=True)
        for numerics in options.numerics
    ]
    for dtype in options.peer_dtypes:
        contenders.append(Contender(f"transformers {dtype}", "transformers_rollout.py", directory, dtype))
    if options.peer_python:
        for dtype in options.peer_dtypes:
            contenders.append(
                Contender(f"vLLM {dtype}", "vllm_rollout.py", directory, dtype, python=options.peer_python)
            )
    return contenders


def run_turn(
    contenders: Sequence[Contender], loads: Sequence[Load], tokenizer: Any, turn: int, weight_bytes: dict[str, int]
) -> dict[str, dict[str, float]]:
    """Tokens per second by load and contender, on the same new prompts; who begins changes from turn to turn."""
    speeds: dict[str, dict[str, float]] = {}
    order = [*contenders[turn % len(contenders) :], *contenders[: turn % len(contenders)]]
    prompts: list[str] = []
    for number, load in enumerate(loads):
        if not load.is_hot:
            prompts = new_prompts(tokenizer, load.num_prompts, seed=turn * len(loads) + number)
        with busy_process(is_wanted=load.is_busy):
            speeds[load.name] = {one.name: run_load(one, load, prompts, turn, weight_bytes) for one in order}
    return speeds


def run_load(
    contender: Contender, load: Load, prompts: Sequence[str], seed: int, weight_bytes: dict[str, int]
) -> float:
    answer = contender.ask(prompts=prompts, group_size=load.group_size, max_tokens=load.max_tokens, seed=seed)
    if answer["num_tokens"] != load.num_tokens:
        raise RuntimeError(f"{contender.name} made {answer['num_tokens']} tokens, the job has {load.num_tokens}")
    if "weight_bytes" in answer:
        weight_bytes[contender.name] = answer["weight_bytes"]
    return load.num_tokens / answer["seconds"]


def floor_shares(results: Results, loads: Sequence[Load], weight_bytes: dict[str, int]) -> dict[str, float]:
    """A single sequence reads all weights for each token: what is reached of the read bandwidth measured just now."""
    single = [load.name for load in loads if load.num_prompts * load.group_size == 1]
    if not single:
        return {}
    bandwidth = read_bandwidth()
    medians = {name: statistics.median(results[single[0]][name]) for name in weight_bytes}
    return {name: median * weight_bytes[name] / bandwidth for name, median in medians.items()}


def new_prompts(tokenizer: Any, num_prompts: int, seed: int) -> list[str]:
    """About 40 tokens each, in the model's chat template, and different for every seed from the first lines on."""
    return [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": f"Round {seed}: you add numbers."},
                {"role": "user", "content": f"What is {17 + 3 * i} + {5 + 7 * i}? Answer with a number."},
            ],
            add_generation_prompt=True,
            tokenize=False,
        )
        for i in range(num_prompts)
    ]


def load_tokenizer(model: str) -> Any:
    from engine.checkpoint import resolve_model
    from engine.tokenizer import load_tokenizer as load

    return load(resolve_model(model))


def collect(results: Results, speeds: dict[str, dict[str, float]]) -> None:
    for load, by_contender in speeds.items():
        for name, speed in by_contender.items():
            results[load][name].append(speed)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_rollout", description=__doc__))
