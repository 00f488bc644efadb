"""transformers' `generate` as a contender in bench_rollout; arguments: MODEL_DIRECTORY DTYPE. Needs nothing of ours."""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from protocol import Connection
from transformers import AutoModelForCausalLM, AutoTokenizer


def main(model_directory: str, dtype: str) -> None:
    connection = Connection()
    tokenizer = AutoTokenizer.from_pretrained(model_directory, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=getattr(torch, dtype)).eval()

    def rollout(prompts: list[str], group_size: int, max_tokens: int, seed: int) -> dict[str, Any]:
        torch.manual_seed(seed)
        start = time.perf_counter()
        inputs = tokenizer(
            [prompt for prompt in prompts for _ in range(group_size)],
            return_tensors="pt",
            padding=True,
            add_special_tokens=False,
        )
        with torch.inference_mode():
            token_ids = model.generate(
                **inputs, do_sample=True, temperature=1.0, top_k=0, max_new_tokens=max_tokens, min_new_tokens=max_tokens
            )
        seconds = time.perf_counter() - start
        num_samples, length = token_ids.shape
        return {"seconds": seconds, "num_tokens": num_samples * (length - inputs.input_ids.shape[1])}

    connection.serve(rollout)


if __name__ == "__main__":
    main(*sys.argv[1:])
