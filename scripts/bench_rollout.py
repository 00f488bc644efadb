"""Times rollouts: Lockstep's engine beside transformers, and vLLM where another environment has it.

Every repetition brings new prompts, so that no prefix cache helps anybody; contenders take turns within it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console

from scripts.timing import Contender, busy_process, model_directory, results_table, started, summary, write_json

OURS = "Lockstep float32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    num_prompts: int = 8
    """Prompts of one repetition."""
    group_size: int = 8
    """Samples of each prompt."""
    max_tokens: int = 32
    """New tokens of each sample; none ends earlier."""
    repetitions: int = 5
    """Timed repetitions, after one that is not."""
    busy_repetitions: int = 2
    """Further ones beside a process that keeps a core busy; 0 leaves them out."""
    peer_python: str | None = None
    """The Python of an environment that has vLLM, to time it as well."""
    peer_dtypes: tuple[str, ...] = ("bfloat16", "float32")
    """Number formats in which the others run."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


def main(options: Options) -> None:
    console = Console()
    contenders = make_contenders(options)
    with started(contenders, console):
        tokenizer = load_tokenizer(options.model)
        run_turn(contenders, tokenizer, options, turn=0)
        alone, busy = {}, {}
        for turn in range(1, options.repetitions + 1):
            collect(alone, run_turn(contenders, tokenizer, options, turn), console)
        with busy_process(is_wanted=options.busy_repetitions > 0):
            for turn in range(options.repetitions + 1, options.repetitions + options.busy_repetitions + 1):
                collect(busy, run_turn(contenders, tokenizer, options, turn), console)
    job = f"{options.num_prompts} prompts x {options.group_size} samples x {options.max_tokens} tokens"
    console.print(results_table(f"{job}, prefix cache cold", "tokens/s", alone, OURS, digits=0))
    if busy:
        console.print(results_table("beside a busy process", "tokens/s", busy, OURS, digits=0))
    if options.output:
        figures = {"tokens_per_second": summary(alone, OURS), "beside_a_busy_process": summary(busy, OURS)}
        write_json(options.output, "rollout", options, figures)


def make_contenders(options: Options) -> list[Contender]:
    directory = model_directory(options.model)
    contenders = [Contender(OURS, "lockstep_rollout.py", options.model, is_ours=True)]
    for dtype in options.peer_dtypes:
        contenders.append(Contender(f"transformers {dtype}", "transformers_rollout.py", directory, dtype))
    if options.peer_python:
        for dtype in options.peer_dtypes:
            contenders.append(
                Contender(f"vLLM {dtype}", "vllm_rollout.py", directory, dtype, python=options.peer_python)
            )
    return contenders


def run_turn(contenders: list[Contender], tokenizer: Any, options: Options, turn: int) -> dict[str, float]:
    """Tokens per second of each contender on the same new prompts; who begins changes from turn to turn."""
    prompts = new_prompts(tokenizer, options.num_prompts, turn)
    num_tokens = options.num_prompts * options.group_size * options.max_tokens
    speeds = {}
    first = turn % len(contenders)
    for contender in contenders[first:] + contenders[:first]:
        answer = contender.ask(prompts=prompts, group_size=options.group_size, max_tokens=options.max_tokens, seed=turn)
        if answer["num_tokens"] != num_tokens:
            raise RuntimeError(f"{contender.name} made {answer['num_tokens']} tokens where the job has {num_tokens}")
        speeds[contender.name] = num_tokens / answer["seconds"]
    return {contender.name: speeds[contender.name] for contender in contenders}


def new_prompts(tokenizer: Any, num_prompts: int, turn: int) -> list[str]:
    """About 40 tokens each, in the model's chat template, and different in every turn from the first lines on."""
    return [
        tokenizer.apply_chat_template(
            [
                {"role": "system", "content": f"Turn {turn}: you add numbers."},
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


def collect(results: dict[str, list[float]], speeds: dict[str, float], console: Console) -> None:
    for name, speed in speeds.items():
        results.setdefault(name, []).append(speed)
    console.print(", ".join(f"{name} {speed:.0f}" for name, speed in speeds.items()), style="dim")


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_rollout", description=__doc__))
