"""Lockstep's engine as a contender in bench_scheduling; arguments: MODEL_DIRECTORY MAX_NUM_SEQS OPTIONS (JSON)."""

from __future__ import annotations

import gc
import json
import sys
import time
from typing import Any

from protocol import Connection

from engine import EngineConfig, LLMEngine, SamplingParams


def main(model_directory: str, max_num_seqs: str, options: str) -> None:
    connection = Connection()
    engine = LLMEngine(
        EngineConfig(model_directory, max_model_len=2048, max_num_seqs=int(max_num_seqs), **json.loads(options))
    )
    gc.collect()
    gc.freeze()  # as an engine's process does (rollout/engine_actor.py)

    def requests(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        params = SamplingParams(max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True)
        start = time.perf_counter()
        groups = engine.generate(prompts, params)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "num_tokens": sum(len(group[0].logprobs) for group in groups)}

    connection.serve(requests)


if __name__ == "__main__":
    main(*sys.argv[1:])
