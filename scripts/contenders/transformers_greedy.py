"""transformers as a reader of an exported model in compare_export; argument: MODEL_DIRECTORY. Needs nothing of ours."""

from __future__ import annotations

import sys
from typing import Any

import torch
from protocol import Connection
from transformers import AutoModelForCausalLM


def main(model_directory: str) -> None:
    connection = Connection()
    model = AutoModelForCausalLM.from_pretrained(model_directory, dtype=torch.float32).eval()

    def generate(prompts: list[list[int]], max_tokens: int) -> dict[str, Any]:
        written = []
        for prompt in prompts:
            ids = torch.tensor([prompt])
            with torch.inference_mode():
                output = model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_tokens
                )
            written.append(output[0, len(prompt) :].tolist())
        return {"token_ids": written}

    connection.serve(generate)


if __name__ == "__main__":
    main(*sys.argv[1:])
