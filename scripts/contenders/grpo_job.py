"""The problems and the reward that bench_grpo_step gives to every contender. Standard library only."""

from __future__ import annotations

import random
import re
from typing import Any

NUM_ROWS = 256


def rows() -> list[dict[str, Any]]:
    """Sums of two numbers up to 99, as chat messages."""
    numbers = random.Random(0)
    pairs = [(numbers.randint(1, 99), numbers.randint(1, 99)) for _ in range(NUM_ROWS)]
    return [
        {
            "prompt": [{"role": "user", "content": f"What is {a} + {b}? Answer with a number."}],
            "answer": str(a + b),
        }
        for a, b in pairs
    ]


def last_number_is_right(prompts: list, completions: list, answer: list[str], **columns: Any) -> list[float]:
    """1 where the last number of a completion is the answer, else 0. Completions are text or chat messages."""
    texts = [completion if isinstance(completion, str) else completion[0]["content"] for completion in completions]
    numbers = [re.findall(r"-?\d+", text) for text in texts]
    return [float(bool(found) and found[-1] == right) for found, right in zip(numbers, answer, strict=True)]
