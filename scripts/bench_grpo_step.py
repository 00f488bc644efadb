"""Times a GRPO step: Lockstep's loop (rollout, reward, training, weight sync) beside TRL's trainer on the same job."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tyro
from rich.console import Console

from scripts.timing import Contender, model_directory, results_table, started, summary, write_json

Numerics = Literal["float32", "bfloat16", "bfloat16-dot"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What to time, and how often."""

    model: str = "smollm2-135m-instruct"
    """As the recipe's --model."""
    numerics: tuple[Numerics, ...] = ("float32", "bfloat16-dot")
    """Lockstep's profiles to time."""
    with_unshared: bool = False
    """Time Lockstep without sharing a group's prompt in the training forward, too."""
    num_prompts: int = 8
    """Prompts of a step."""
    group_size: int = 8
    """Samples of each prompt; all of them are trained on."""
    max_tokens: int = 32
    """Longest completion."""
    learning_rate: float = 1e-6
    """AdamW's, in float32."""
    repetitions: int = 3
    """Timed steps, after one that is not."""
    peer_python: str | None = None
    """The Python of an environment that has TRL, to time it as well."""
    peer_batch_size: int = 8
    """Samples that TRL takes through one training forward."""
    output: Path | None = None
    """Where to write all figures, as JSON."""

    def job(self, share_prompts: bool = True) -> str:
        """What the contenders are told."""
        names = ("num_prompts", "group_size", "max_tokens", "learning_rate", "peer_batch_size")
        job = {name: getattr(self, name) for name in names}
        return json.dumps(job | {"num_steps": self.repetitions + 1, "share_prompts": share_prompts})


def main(options: Options) -> None:
    console = Console()
    contenders = make_contenders(options)
    ours = [our_name(numerics, share_prompts) for numerics, share_prompts in our_variants(options)]
    results: dict[str, list[float]] = {contender.name: [] for contender in contenders}
    details: list[dict[str, Any]] = []
    with started(contenders, console):
        for turn in range(options.repetitions + 1):
            answers = {contender.name: contender.ask() for contender in contenders}
            console.print(", ".join(f"{name} {answers[name]['seconds']:.1f} s" for name in results), style="dim")
            if turn > 0:
                details.append(answers)
                for name, answer in answers.items():
                    results[name].append(answer["seconds"])
    job = f"{options.num_prompts} prompts x {options.group_size} samples x at most {options.max_tokens} tokens"
    console.print(results_table(f"GRPO step, {job}", "seconds", results, ours, digits=1))
    if options.output:
        figures = {"seconds": summary(results, ours), "steps": details}
        write_json(options.output, "grpo_step", options, figures)


def our_variants(options: Options) -> list[tuple[Numerics, bool]]:
    """(profile, whether prompts are shared) of each of Lockstep's contenders."""
    return [
        (one, shared) for one in options.numerics for shared in ((True, False) if options.with_unshared else (True,))
    ]


def our_name(numerics: str, share_prompts: bool) -> str:
    return f"Lockstep {numerics}{'' if share_prompts else ', unshared'}"


def make_contenders(options: Options) -> list[Contender]:
    contenders = [
        Contender(
            our_name(numerics, shared),
            "lockstep_grpo_step.py",
            options.model,
            numerics,
            options.job(shared),
            is_ours=True,
        )
        for numerics, shared in our_variants(options)
    ]
    if options.peer_python:
        directory = model_directory(options.model)
        contenders.append(
            Contender("TRL float32", "trl_grpo_step.py", directory, options.job(), python=options.peer_python)
        )
    return contenders


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.bench_grpo_step", description=__doc__))
