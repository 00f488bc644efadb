"""Peer: requests a second on a model so small that most of the time is the engine's own, beside vLLM."""

from __future__ import annotations

import json
import random
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from safetensors.torch import save_file

from engine.model import Transformer
from engine.model_config import ModelConfig
from scripts.bench_scheduling.loads import VOCAB_SIZE
from scripts.gpu_check.random_models import random_weights
from scripts.timing import Contender, started

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 512, 32, 16
MAX_NUM_SEQS = 256
TITLE = f"{NUM_REQUESTS} requests of {PROMPT_TOKENS} + {NEW_TOKENS} tokens, 2 layers, {VOCAB_SIZE} words, float32"
OURS: dict[str, dict[str, Any]] = {
    "Lockstep": {},
    "Lockstep, async, 1 kernel thread": {"async_scheduling": True, "num_threads": 1},
    "Lockstep, 8 steps a cycle": {"num_scheduler_steps": 8},
}
"""Options of EngineConfig by name of the contender."""


def requests_per_second(
    model: Mapping[str, Any], peer_python: str | None, repetitions: int, console: Console
) -> dict[str, list[float]]:
    """By contender, in order of the turns. Every turn has new prompts; who begins changes from turn to turn."""
    with model_directory(model) as directory:
        contenders = make_contenders(directory, peer_python)
        results: dict[str, list[float]] = {contender.name: [] for contender in contenders}
        with started(contenders, console):
            for turn in range(repetitions + 1):
                order = [*contenders[turn % len(contenders) :], *contenders[: turn % len(contenders)]]
                prompts = new_prompts(seed=turn)
                for contender in order:
                    speed = ask(contender, prompts)
                    if turn > 0:
                        results[contender.name].append(speed)
    return results


def make_contenders(directory: Path, peer_python: str | None) -> list[Contender]:
    places = str(directory), str(MAX_NUM_SEQS)
    contenders = [
        Contender(name, "lockstep_requests.py", *places, json.dumps(options), is_ours=True)
        for name, options in OURS.items()
    ]
    if peer_python:
        contenders.append(Contender("vLLM", "vllm_requests.py", *places, python=peer_python))
    return contenders


def ask(contender: Contender, prompts: Sequence[Sequence[int]]) -> float:
    answer = contender.ask(prompts=prompts, max_tokens=NEW_TOKENS)
    if answer["num_tokens"] != len(prompts) * NEW_TOKENS:
        raise RuntimeError(f"{contender.name} gave {answer['num_tokens']} log-probabilities for {len(prompts)} prompts")
    return len(prompts) / answer["seconds"]


def new_prompts(seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(3, VOCAB_SIZE) for _ in range(PROMPT_TOKENS)] for _ in range(NUM_REQUESTS)]


@contextmanager
def model_directory(model: Mapping[str, Any]) -> Iterator[Path]:
    """Random weights for the entries of a config.json, where any program can read them."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        (directory / "config.json").write_text(json.dumps(model))
        shapes = Transformer(ModelConfig.from_directory(directory)).weight_shapes()
        save_file(dict(random_weights(shapes, "cpu")), directory / "model.safetensors")
        yield directory
