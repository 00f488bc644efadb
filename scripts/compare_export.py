"""Compares what an exported model writes greedily here with what it writes in transformers and in vLLM.

`python -m scripts.compare_export OUTPUT_DIR/checkpoints/step-000060/model --peer-python PYTHON_WITH_VLLM`: each reads
the directory by itself, in float32. Sums in another order round differently, so where two tokens are nearly equally
likely another one may win: a sample is compared up to its first such place, and the gap there must be small.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from scripts.timing import Contender, started, write_json

MAX_GAP = 0.01  # nats between the two likeliest tokens that may still be told apart differently


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What is compared."""

    model: tyro.conf.Positional[str]
    """Directory of the exported model: a run's weights/, or model/ of a checkpoint."""
    peer_python: str | None = None
    """The Python of an environment that has vLLM, to compare with it as well."""
    num_prompts: int = 32
    """Prompts, the recipe's sums and sentences by turns."""
    max_tokens: int = 32
    """Longest completion."""
    output: Path | None = None
    """Where to write all figures, as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Agreement:
    """Of one reader with our engine."""

    reader: str
    num_samples: int
    num_equal: int  # samples that are the same from beginning to end
    num_tokens: int  # that were compared and are the same
    gaps: list[float]  # nats by which our token was likelier, where a sample went another way

    @property
    def is_good(self) -> bool:
        return all(gap <= MAX_GAP for gap in self.gaps)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """What our engine wrote for a prompt."""

    token_ids: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]  # of the likeliest tokens, by place


def main(options: Options) -> None:
    console = Console()
    prompts = make_prompts(options)
    ours = write(options, prompts)
    readers = [Contender("transformers", "transformers_greedy.py", options.model)]
    if options.peer_python:
        readers.append(Contender("vLLM", "vllm_greedy.py", options.model, python=options.peer_python))
    with started(readers, console):
        answers = {one.name: one.ask(prompts=prompts, max_tokens=options.max_tokens)["token_ids"] for one in readers}
    agreements = [compare(name, ours, theirs) for name, theirs in answers.items()]
    console.print(table(agreements))
    if options.output:
        write_json(options.output, "export", options, {"readers": [asdict(one) for one in agreements]})
    if not all(one.is_good for one in agreements):
        raise SystemExit(f"a sample went another way where the likeliest token was ahead by more than {MAX_GAP} nats")


def make_prompts(options: Options) -> list[list[int]]:
    from engine.tokenizer import encode, load_tokenizer

    tokenizer = load_tokenizer(Path(options.model))
    texts = [
        f"{3 + i} + {2 * i + 1} =" if i % 2 else f"In the year {1900 + 3 * i}, the" for i in range(options.num_prompts)
    ]
    return [encode(tokenizer, text, len(tokenizer)) for text in texts]


def write(options: Options, prompts: Sequence[list[int]]) -> list[Sample]:
    """By our engine."""
    from engine import EngineConfig, LLMEngine, SamplingParams

    engine = LLMEngine(EngineConfig(options.model, numerics="float32"))
    groups = engine.generate(list(prompts), SamplingParams(temperature=0.0, max_tokens=options.max_tokens, logprobs=5))
    return [Sample(token_ids=one.token_ids, logprobs=one.logprobs, top_logprobs=one.top_logprobs) for [one] in groups]


def compare(reader: str, ours: Sequence[Sample], theirs: Sequence[list[int]]) -> Agreement:
    places = [first_difference(our.token_ids, their) for our, their in zip(ours, theirs, strict=True)]
    return Agreement(
        reader=reader,
        num_samples=len(ours),
        num_equal=places.count(None),
        num_tokens=sum(len(our.token_ids) if at is None else at for our, at in zip(ours, places, strict=True)),
        gaps=[gap(our, their, at) for our, their, at in zip(ours, theirs, places, strict=True) if at is not None],
    )


def first_difference(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """The first place where they differ, an end among them; None where they are the same."""
    for place, (one, other) in enumerate(zip(ours, theirs, strict=False)):
        if one != other:
            return place
    return None if len(ours) == len(theirs) else min(len(ours), len(theirs))


def gap(ours: Sample, theirs: Sequence[int], place: int) -> float:
    """Nats by which the likeliest token was ahead of the one that they wrote; infinite where it was not near it."""
    if place >= len(ours.token_ids) or place >= len(theirs):
        return float("inf")
    return ours.logprobs[place] - ours.top_logprobs[place].get(theirs[place], float("-inf"))


def table(agreements: Sequence[Agreement]) -> Table:
    shown = Table("reader", "samples", "the same", "tokens", "largest gap at a difference", box=SIMPLE_HEAD)
    for one in agreements:
        largest = f"{max(one.gaps):.2g} nats" if one.gaps else "none differs"
        shown.add_row(one.reader, str(one.num_samples), str(one.num_equal), f"{one.num_tokens:,}", largest)
    return shown


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python -m scripts.compare_export", description=__doc__))
