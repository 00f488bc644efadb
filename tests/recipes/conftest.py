"""Data on which the tiny model learns something."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from engine import Completion, EngineConfig, LLMEngine, SamplingParams

sys.path.insert(0, str(Path(__file__).parent))  # for running.py


@pytest.fixture(scope="session")
def likely_data(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A JSONL file whose answers the tiny model gives now and then, so that groups of samples have spread."""
    prompts = [f"{a} + {b} =" for a in range(8) for b in range(5)]
    engine = LLMEngine(EngineConfig(str(tiny_model_dir())))
    groups = engine.generate(prompts, SamplingParams(n=32, max_tokens=1, seed=1))
    path = tmp_path_factory.mktemp("data") / "likely.jsonl"
    rows = [{"prompt": prompt, "answer": most_common(group)} for prompt, group in zip(prompts, groups, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def most_common(completions: list[Completion]) -> str:
    texts = Counter(completion.text for completion in completions if completion.text.strip().isalnum())
    return texts.most_common(1)[0][0] if texts else "none"
