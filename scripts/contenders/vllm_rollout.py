"""vLLM as a contender in bench_rollout; arguments: MODEL_DIRECTORY DTYPE. Runs in an environment that has vLLM."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from protocol import Connection


def main(model_directory: str, dtype: str) -> None:
    connection = Connection()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(model_directory, dtype=dtype, max_model_len=1024, logprobs_mode="processed_logprobs")

    def rollout(prompts: list[str], group_size: int, max_tokens: int, seed: int) -> dict[str, Any]:
        params = SamplingParams(n=group_size, max_tokens=max_tokens, ignore_eos=True, logprobs=0, seed=seed)
        start = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - start
        num_tokens = sum(len(sample.token_ids) for output in outputs for sample in output.outputs)
        return {"seconds": seconds, "num_tokens": num_tokens}

    connection.serve(rollout)


if __name__ == "__main__":
    main(*sys.argv[1:])
