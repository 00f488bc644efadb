"""Tiny models of every family in docs/models.md, for the tests against transformers and for those of exactness."""

from __future__ import annotations

from typing import Any

import pytest
from exactness_checks import TINY

# Scaled contexts of 32 positions, which the tests' sequences outgrow. Where max_position_embeddings says 32 too, the
# factor is what makes room for them.
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}

_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-wide": ("llama", TINY),
    "llama-nine-heads-untied": (
        "llama",
        {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": False},
    ),
    "llama-bias": ("llama", {"attention_bias": True}),
    "llama-llama3": ("llama", {"rope_parameters": LLAMA3}),
    "llama-linear": ("llama", {"rope_parameters": LINEAR, "max_position_embeddings": 32}),
    "smollm3": ("smollm3", {}),
    "smollm3-window": ("smollm3", {"no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 6}),
    "mistral": ("mistral", {"num_key_value_heads": 1}),
    "mistral-window": ("mistral", {"sliding_window": 7}),
    "qwen2": ("qwen2", {"num_attention_heads": 14, "num_key_value_heads": 2, "intermediate_size": 300}),
    "qwen2-window": ("qwen2", {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": 1}),
    "qwen2-yarn": ("qwen2", {"rope_parameters": YARN, "max_position_embeddings": 32}),
    "qwen3": ("qwen3", {"head_dim": 32}),
    "qwen3-six-heads": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "vocab_size": 333}),
    "qwen3-window": ("qwen3", {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1}),
}
FAMILIES = [pytest.param(*family, id=name) for name, family in _FAMILIES.items()]
