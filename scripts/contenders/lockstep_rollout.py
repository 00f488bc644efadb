"""Lockstep's engine as a contender in bench_rollout; arguments: MODEL."""

from __future__ import annotations

import sys
import time
from typing import Any

from protocol import Connection

from engine import EngineConfig, LLMEngine, SamplingParams


def main(model: str) -> None:
    connection = Connection()
    engine = LLMEngine(EngineConfig(model=model))

    def rollout(prompts: list[str], group_size: int, max_tokens: int, seed: int) -> dict[str, Any]:
        params = SamplingParams(n=group_size, max_tokens=max_tokens, ignore_eos=True, seed=seed)
        start = time.perf_counter()
        groups = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        return {"seconds": seconds, "num_tokens": num_tokens}

    connection.serve(rollout)


if __name__ == "__main__":
    main(sys.argv[1])
