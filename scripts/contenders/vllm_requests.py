"""vLLM as a contender in bench_scheduling; arguments: MODEL_DIRECTORY MAX_NUM_SEQS. Runs where vLLM is installed."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from protocol import Connection


def main(model_directory: str, max_num_seqs: str) -> None:
    connection = Connection()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(
        model_directory, dtype="float32", max_model_len=2048, max_num_seqs=int(max_num_seqs), enforce_eager=True,
        enable_prefix_caching=True, logprobs_mode="processed_logprobs", skip_tokenizer_init=True,
    )  # fmt: skip

    def requests(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        params = SamplingParams(
            max_tokens=max_tokens, min_tokens=max_tokens, ignore_eos=True, logprobs=0, detokenize=False
        )
        start = time.perf_counter()
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "num_tokens": sum(len(output.outputs[0].logprobs) for output in outputs)}

    connection.serve(requests)


if __name__ == "__main__":
    main(*sys.argv[1:])
