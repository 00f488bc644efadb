"""Random models: engines with the shapes of known models and no file of theirs."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from engine import EngineConfig, LLMEngine
from engine.ops import Ops
from engine.pipeline import Runner

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"], "vocab_size": 151936, "num_hidden_layers": 28, "num_attention_heads": 16,
    "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": True,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {**QWEN3, "hidden_size": 1024, "intermediate_size": 3072},
    "qwen3-1.7b": {**QWEN3, "hidden_size": 2048, "intermediate_size": 6144},
}
TINY: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 1024, "tie_word_embeddings": False,
}  # fmt: skip


def random_engine(
    model: Mapping[str, Any], *, seed: int = 0, ops: Ops | None = None, runner: Runner | None = None, **options: Any
) -> LLMEngine:
    """An engine for the entries of a config.json, with random weights made where it runs; options of EngineConfig."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(model))
        config = EngineConfig(directory, **options)
        device = "cuda" if config.device_name == "cuda" else "cpu"
        return LLMEngine(
            config, make_weights=lambda shapes: random_weights(shapes, device, seed), ops=ops, runner=runner
        )


def random_weights(
    shapes: Mapping[str, tuple[int, ...]], device: str, seed: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Bfloat16 matrices by which attention looks around and next tokens are neither certain nor all alike."""
    generator = torch.Generator(device).manual_seed(seed)
    for name, shape in shapes.items():
        noise = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
        if "norm" in name:
            yield name, 1 + 0.2 * noise
        elif len(shape) == 1:
            yield name, 0.2 * noise
        else:
            yield name, noise * ((2.0 if "embed" in name or "lm_head" in name else 1.5) * shape[1] ** -0.5)
