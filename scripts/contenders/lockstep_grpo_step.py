"""Lockstep's GRPO loop as a contender in bench_grpo_step; arguments: MODEL NUMERICS JOB (see bench_grpo_step.Job)."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from grpo_job import last_number_is_right, rows
from protocol import Connection

from rollout import EngineConfig
from trainers import GRPOConfig, GRPOTrainer

REPORTED = ("timing_s/rollout", "timing_s/train", "timing_s/weight_sync", "mismatch/logprob_abs_diff_max",
            "response_length/mean", "reward/mean")  # fmt: skip


def main(model: str, numerics: str, job: dict[str, Any]) -> None:
    connection = Connection()
    config = GRPOConfig(
        num_steps=job["num_steps"],
        num_prompts=job["num_prompts"],
        group_size=job["group_size"],
        max_tokens=job["max_tokens"],
        stop=(),
        learning_rate=job["learning_rate"],
        skip_zero_std_groups=False,  # the peer trains on every sample, so this does too
        share_prompts=job["share_prompts"],
        eval_every=0,
    )
    started = 0.0

    def on_step(metrics: dict[str, float]) -> None:
        """Ends one timed step and waits for the word to begin the next."""
        nonlocal started
        if metrics["step"] == 0:
            connection.answer(is_ready=True)
        else:
            seconds = time.perf_counter() - started
            connection.answer(seconds=seconds, **{name: metrics[name] for name in REPORTED if name in metrics})
        connection.next_request()
        started = time.perf_counter()

    GRPOTrainer(
        config, EngineConfig(model=model, numerics=numerics), rows(), [last_number_is_right], callbacks=[on_step]
    ).train()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
