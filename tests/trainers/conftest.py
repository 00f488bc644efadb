"""Rollouts for the trainers' tests: made by hand, or drawn by a real engine."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from engine import Completion, LLMEngine, SamplingParams
from rollout import Rollout

sys.path.insert(0, str(Path(__file__).parent))  # for reward_functions.py, here and in reward processes


@pytest.fixture(scope="session")
def make_rollout() -> Callable[..., Rollout]:
    """A rollout with the given fields; the others hold what a plain finished sample would."""

    def make(prompt_token_ids: Sequence[int], token_ids: Sequence[int], **fields: object) -> Rollout:
        plain = {
            "group_id": "g0",
            "index": 0,
            "logprobs": [-0.5 - 0.25 * i for i in range(len(token_ids))],
            "policy_versions": [0] * len(token_ids),
            "finish_reason": "stop",
            "stop_reason": None,
            "text": "",
            "loss_mask": [1] * len(token_ids),
            "seed": 0,
            "sampling_params": SamplingParams(),
            "is_exact": True,
            "kernel_fingerprint": "fingerprint",
            "metadata": {},
        }
        return Rollout(prompt_token_ids=list(prompt_token_ids), token_ids=list(token_ids), **(plain | fields))

    return make


@pytest.fixture(scope="session")
def draw_rollouts(make_rollout: Callable[..., Rollout]) -> Callable[..., list[list[Rollout]]]:
    """Groups of rollouts drawn by an engine of this process: draw(engine, prompts of token ids, params)."""

    def draw(engine: LLMEngine, prompts: Sequence[list[int]], params: SamplingParams) -> list[list[Rollout]]:
        def as_rollout(p: int, completion: Completion) -> Rollout:
            return make_rollout(
                prompts[p],
                completion.token_ids,
                group_id=f"g{p}",
                index=completion.index,
                logprobs=list(completion.logprobs),
                policy_versions=list(completion.policy_versions),
                raw_logprobs=completion.raw_logprobs,
                kept_mass=completion.kept_mass,
                finish_reason=completion.finish_reason,
                text=completion.text,
                sampling_params=params,
                kernel_fingerprint=engine.kernel_fingerprint,
            )

        groups = engine.generate(list(prompts), params)
        return [[as_rollout(p, completion) for completion in group] for p, group in enumerate(groups)]

    return draw
