"""Samples: the rollouts that a report holds, spread evenly over the steps of a run, within a budget of tokens."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from .embed import as_embedded_json

MAX_TOKENS = 120_000  # of all samples kept: a page of some 5 MB
MAX_SAMPLES = 1_000  # of all steps kept
MAX_STEP_SHARE = 4  # a step may take that part of either budget, so that several steps always fit
MAX_SAMPLE_TOKENS = 4_096  # of a longer completion the beginning is shown
MAX_TEXT = 8_192  # characters of a prompt, of which the end is shown, and of an answer
CHARACTERS_PER_TOKEN = 4  # what a prompt's text takes of the budget


@dataclass(frozen=True, kw_only=True)
class Step:
    """The samples that are kept of one step."""

    step: int
    records: Sequence[Mapping[str, Any]]
    num_tokens: int  # of the budget
    num_left_out: int

    @cached_property
    def json(self) -> str:
        """The step as it stands in the page; most steps are dropped before anyone asks."""
        groups = [_group(list(members)) for _, members in groupby(self.records, key=lambda record: record["group_id"])]
        return as_embedded_json({"step": self.step, "left_out": self.num_left_out, "groups": groups})


class Samples:
    """Keeps the first step, the latest, and of those between every n-th; n doubles when the budget is spent."""

    def __init__(self, max_tokens: int = MAX_TOKENS, max_samples: int = MAX_SAMPLES) -> None:
        self.max_tokens, self.max_samples = max_tokens, max_samples
        self.stride = 1
        self.steps: list[Step] = []  # the latest comes last, whether or not the stride falls on it

    def add(self, records: Sequence[Mapping[str, Any]]) -> None:
        """The records of one step, as rollouts.jsonl has them; none are fine. Steps come in order."""
        if not records:
            return
        if len(self.steps) > 1 and not self._is_due(self.steps[-1].step):
            self.steps.pop()
        self.steps.append(self._cut(records))
        while len(self.steps) > 2 and not self._fits():
            self.stride *= 2
            self.steps = [step for step in self.steps[:-1] if self._is_due(step.step)] + self.steps[-1:]

    def as_json(self) -> str:
        """A JSON list of steps, fit to stand inside a script element."""
        return "[" + ",\n".join(step.json for step in self.steps) + "]"

    def _is_due(self, step: int) -> bool:
        return (step - self.steps[0].step) % self.stride == 0

    def _fits(self) -> bool:
        num_tokens = sum(step.num_tokens for step in self.steps)
        return num_tokens <= self.max_tokens and sum(len(step.records) for step in self.steps) <= self.max_samples

    def _cut(self, records: Sequence[Mapping[str, Any]]) -> Step:
        """The step's first samples that fit its share of the budget, and at least one."""
        kept: list[Mapping[str, Any]] = []
        num_tokens = 0
        for record in records:
            cost = _cost(record, is_first=not kept or kept[-1]["group_id"] != record["group_id"])
            has_room = num_tokens + cost <= self.max_tokens // MAX_STEP_SHARE
            if kept and not (has_room and len(kept) < self.max_samples // MAX_STEP_SHARE):
                break
            kept.append(record)
            num_tokens += cost
        step, num_left_out = int(records[0]["step"]), len(records) - len(kept)
        return Step(step=step, records=kept, num_tokens=num_tokens, num_left_out=num_left_out)


def _cost(record: Mapping[str, Any], is_first: bool) -> int:
    """What a sample takes of the budget in tokens; the first of its group brings the prompt."""
    characters = sum(len(message["text"]) for message in _prompt(record["prompt"])) if is_first else 0
    return min(len(record["token_ids"]), MAX_SAMPLE_TOKENS) + characters // CHARACTERS_PER_TOKEN


def _group(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What the samples of a group share is said once."""
    first = records[0]
    return {
        "group_id": first["group_id"],
        "prompt": _prompt(first["prompt"]),
        "answer": _text(first.get("answer"))[:MAX_TEXT],
        "samples": [_sample(record) for record in records],
    }


def _sample(record: Mapping[str, Any]) -> dict[str, Any]:
    end = MAX_SAMPLE_TOKENS
    sample = {
        "index": record["index"],
        "seed": str(record["seed"]),  # 64 bits, more than a number in JavaScript holds
        "reward": record["reward"],
        "finish_reason": record["finish_reason"],
        "num_tokens": len(record["token_ids"]),
        "ids": record["token_ids"][:end],
        "logprobs": [_float32(value) for value in record["logprobs"][:end]],
        "versions": _runs(record["policy_versions"][:end]),
        "advantage": _advantage(record),
    }
    if record.get("token_texts") is not None:
        sample["texts"] = record["token_texts"][:end]
    else:
        sample["completion"] = record["completion"][: MAX_SAMPLE_TOKENS * CHARACTERS_PER_TOKEN]
    return sample


def _advantage(record: Mapping[str, Any]) -> float | list[float] | None:
    """The sample's advantage, or one for each token where the trainer gives these (PPO)."""
    value = record.get("advantages", record.get("advantage"))
    if isinstance(value, Sequence):
        return [float(f"{item:.6g}") for item in value[:MAX_SAMPLE_TOKENS]]
    return value


def _prompt(prompt: Any) -> list[dict[str, str]]:
    """A prompt as messages; one that is no chat has a single one, without a role. Of a long one, the end."""
    messages = [{"role": "", "text": _text(prompt)}]
    if isinstance(prompt, list | tuple) and prompt and all(isinstance(message, Mapping) for message in prompt):
        messages = [{"role": str(message.get("role", "")), "text": _text(message.get("content"))} for message in prompt]
    shown: list[dict[str, str]] = []
    room = MAX_TEXT
    for message in reversed(messages):
        text = message["text"] if len(message["text"]) <= room else "…" + message["text"][-room:]
        shown.insert(0, {"role": message["role"], "text": text})
        room -= len(message["text"])
        if room <= 0:
            break
    return shown


def _text(value: Any) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _runs(versions: Sequence[int]) -> list[list[int]]:
    """Versions as [version, how many tokens in a row] pairs."""
    return [[version, len(list(run))] for version, run in groupby(versions)]


def _float32(value: float | None) -> float | None:
    """A float32 in the nine digits that tell it from every other."""
    return None if value is None else float(f"{value:.9g}")
