"""Run directories made up for the tests of the report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

CONFIG = {"model": "models/tiny", "dataset": "sums", "num_steps": 4, "num_prompts": 2, "group_size": 2}
ENVIRONMENT = {
    "started": "2026-01-02T10:00:00+0000",
    "commit": "0123abcd",
    "engine": {"kernel_fingerprint": "f00d", "num_threads": 2},
}
METRICS = [
    {"step": 0, "eval/expected_reward": 0.25},
    *(
        {
            "step": step,
            "reward/mean": step / 10,
            "mismatch/logprob_abs_diff_max": 0.0,
            "mismatch/num_tokens": 500,
            "timing_s/rollout": 2.0,
            "timing_s/train": 3.0,
            "timing_s/step": 5.5,
            "house/own_metric": step,
        }
        for step in range(1, 4)
    ),
    {"step": 4, "reward/mean": None, "eval/expected_reward": 0.75, "mismatch/num_tokens": 500},
]


def record(step: int, group: int = 0, index: int = 0, texts: Sequence[str] = ("a", "b"), **changes: Any) -> dict:
    """A line of rollouts.jsonl."""
    return {
        "step": step,
        "prompt": "1 + 1 =",
        "completion": "".join(texts),
        "answer": "2",
        "reward": float(index),
        "advantage": index - 0.5,
        "finish_reason": "stop",
        "group_id": f"step{step}-prompt{group}",
        "index": index,
        "seed": 2**64 - 1 - index,
        "policy_versions": [step - 1] * len(texts),
        "token_ids": list(range(10, 10 + len(texts))),
        "logprobs": [-0.125 * place for place in range(len(texts))],
        "token_texts": list(texts),
    } | changes


def step_records(step: int) -> list[dict]:
    return [record(step, group, index) for group in range(2) for index in range(2)]


def write_run(
    directory: Path, metrics: Sequence[Mapping[str, Any]] = METRICS, records: Sequence[Mapping[str, Any]] | None = None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    records = [item for step in range(1, 5) for item in step_records(step)] if records is None else records
    for name, lines in (("metrics.jsonl", metrics), ("rollouts.jsonl", records)):
        (directory / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "config.yaml").write_text(yaml.safe_dump(CONFIG))
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT))
    return directory
