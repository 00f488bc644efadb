from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch

from engine import EngineConfig, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.checkpoint import iter_weights
from engine.model import Transformer
from engine.model_config import ModelConfig
from kernels.logprobs import token_logprobs
from rollout import Rollout

Weights = dict[str, torch.Tensor]


@pytest.fixture(scope="session")
def model_dir(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("llama")


@pytest.fixture(scope="session")
def config(model_dir: Path) -> EngineConfig:
    return EngineConfig(str(model_dir), num_threads=1, num_blocks=512)


@pytest.fixture(scope="session")
def make_weights(model_dir: Path) -> Callable[[int], Weights]:
    """The model's weights with some noise: the same for the same seed."""

    def make(seed: int) -> Weights:
        generator = torch.Generator().manual_seed(seed)
        return {
            name: tensor.float() * (1 + 0.2 * torch.randn(tensor.shape, generator=generator))
            for name, tensor in iter_weights(model_dir)
        }

    return make


@pytest.fixture(scope="session")
def make_turn() -> Callable[..., Rollout]:
    """A rollout of one turn with the given tokens and fields."""

    def make(token_ids: list[int], **fields: object) -> Rollout:
        plain = {
            "group_id": "g0",
            "index": 0,
            "prompt_token_ids": [1],
            "logprobs": [-0.5] * len(token_ids),
            "policy_versions": [0] * len(token_ids),
            "finish_reason": "stop",
            "stop_reason": None,
            "text": "",
            "loss_mask": [1] * len(token_ids),
            "seed": 0,
            "sampling_params": SamplingParams(),
            "is_exact": True,
            "kernel_fingerprint": "fingerprint",
            "metadata": {},
        }
        return Rollout(token_ids=token_ids, **(plain | fields))

    return make


@pytest.fixture(scope="session")
def forward_logprobs(model_dir: Path) -> Callable[[Mapping[str, torch.Tensor], Rollout], list[float]]:
    """Log-probabilities of a rollout's tokens by one forward over the whole sequence, as a trainer computes them."""
    model_config = ModelConfig.from_directory(model_dir)

    @torch.inference_mode()
    def logprobs(weights: Mapping[str, torch.Tensor], rollout: Rollout) -> list[float]:
        model = Transformer(model_config)
        model.load_weights(weights)
        input_ids = torch.tensor(rollout.prompt_token_ids + rollout.token_ids[:-1])
        attention = PackedAttention.from_segments(
            model_config, [Segment(start_row=0, end_row=len(input_ids))], model.ops
        )
        hidden_TD = model(input_ids, torch.arange(len(input_ids)), attention)
        hidden_CD = hidden_TD[len(rollout.prompt_token_ids) - 1 :]
        targets = torch.tensor(rollout.token_ids)
        temperature = torch.full((len(targets),), rollout.sampling_params.temperature)
        return token_logprobs(hidden_CD, model.lm_head.packed, model_config.vocab_size, targets, temperature).tolist()

    return logprobs
