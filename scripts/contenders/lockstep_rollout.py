"""Lockstep's engine as a contender in bench_rollout; arguments: MODEL NUMERICS."""

from __future__ import annotations

import sys
import time
from typing import Any

from protocol import Connection

from engine import EngineConfig, LLMEngine, SamplingParams

KV_CACHE_BYTES = 512 * 2**20  # enough for every job, and small enough to have been touched after the first one


def main(model: str, numerics: str) -> None:
    connection = Connection()
    engine = LLMEngine(EngineConfig(model=model, numerics=numerics, kv_cache_memory_bytes=KV_CACHE_BYTES))
    weight_bytes = sum(buffer.nbytes for name, buffer in engine.model_runner.model.named_buffers() if "packed" in name)

    def rollout(prompts: list[str], group_size: int, max_tokens: int, seed: int) -> dict[str, Any]:
        params = SamplingParams(n=group_size, max_tokens=max_tokens, ignore_eos=True, seed=seed)
        start = time.perf_counter()
        groups = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(completion.token_ids) for group in groups for completion in group)
        return {"seconds": seconds, "num_tokens": num_tokens, "weight_bytes": weight_bytes}

    connection.serve(rollout)


if __name__ == "__main__":
    main(*sys.argv[1:])
