"""vLLM as a reader of an exported model in compare_export; argument: MODEL_DIRECTORY. Runs where vLLM is installed."""

from __future__ import annotations

import os
import sys
from typing import Any

from protocol import Connection


def main(model_directory: str) -> None:
    connection = Connection()
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    from vllm import LLM, SamplingParams

    llm = LLM(model_directory, dtype="float32", max_model_len=1024, enforce_eager=True)

    def generate(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        params = SamplingParams(temperature=0.0, max_tokens=max_tokens)
        outputs = llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return {"token_ids": [list(output.outputs[0].token_ids) for output in outputs]}

    connection.serve(generate)


if __name__ == "__main__":
    main(*sys.argv[1:])
