"""Scaled frequencies are those of transformers, bit for bit where its power is rounded correctly."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.rope_scaling import (
    LinearScaling,
    Llama3Scaling,
    YarnScaling,
    powers,
    yarn_attention_factor,
)
from kernels.rotary import inverse_frequencies, rotary_table

LLAMA_3_1 = Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
LLAMA_3_2 = Llama3Scaling(factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192)
QWEN2_5 = YarnScaling(factor=4.0, original_max_position_embeddings=32768, attention_factor=yarn_attention_factor(4.0))
CASES = [
    pytest.param("llama3", LLAMA_3_1, 128, 5e5, id="Llama-3.1-8B"),
    pytest.param("llama3", LLAMA_3_2, 64, 5e5, id="Llama-3.2-1B"),
    pytest.param("yarn", QWEN2_5, 128, 1e6, id="Qwen2.5-7B"),
    pytest.param("yarn", QWEN2_5, 64, 1e6, id="Qwen2.5-0.5B"),
    pytest.param("linear", LinearScaling(factor=4.0), 128, 1e4, id="vicuna-16k"),
    pytest.param("linear", LinearScaling(factor=2.7), 80, 123457.0, id="linear"),
    pytest.param(
        "llama3",
        Llama3Scaling(factor=3.3, low_freq_factor=1.7, high_freq_factor=5.1, original_max_position_embeddings=777),
        96, 54321.5, id="llama3",
    ),
    pytest.param(
        "yarn",
        YarnScaling(
            factor=2.6, original_max_position_embeddings=3000, attention_factor=1.25, beta_fast=40.0, beta_slow=0.7
        ),
        80, 98765.0, id="yarn",
    ),
    pytest.param(  # the ramp is one step
        "yarn",
        YarnScaling(
            factor=2.0, original_max_position_embeddings=64, attention_factor=0.9, beta_fast=32.0, beta_slow=16.0
        ),
        16, 1e4, id="yarn-step",
    ),
]  # fmt: skip


def of_transformers(rope_type: str, head_dim: int, theta: float, **parameters: float) -> tuple[torch.Tensor, float]:
    """(frequencies, attention factor)."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, max_position_embeddings=131072,
        rope_parameters={"rope_type": rope_type, "rope_theta": theta, **parameters},
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"))


@pytest.mark.parametrize(("rope_type", "scaling", "head_dim", "theta"), CASES)
def test_frequencies_are_those_of_transformers(rope_type, scaling, head_dim, theta):
    """But where torch's power misses the nearest float32, which builds of torch do in different places."""
    theirs, attention_factor = of_transformers(rope_type, head_dim, theta, **dataclasses.asdict(scaling))
    ours = inverse_frequencies(head_dim, theta, scaling)
    torchs_powers = theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    is_nearest = torchs_powers == torch.from_numpy(powers(head_dim, theta))
    assert is_nearest.float().mean() > 0.9
    assert_same_bits(ours[is_nearest], theirs[is_nearest])
    assert torch.allclose(ours, theirs, rtol=3e-7, atol=0)
    assert torch.tensor(scaling.attention_factor) == torch.tensor(attention_factor)


@pytest.mark.parametrize(("scaling", "head_dim"), [(LLAMA_3_1, 128), (LLAMA_3_2, 64)])
def test_every_frequency_of_llama_3_is_transformers_own(scaling, head_dim):
    """With their base every build of torch so far rounds all powers correctly."""
    theirs, _ = of_transformers("llama3", head_dim, 5e5, **dataclasses.asdict(scaling))
    assert_same_bits(inverse_frequencies(head_dim, 5e5, scaling), theirs)
    plain = inverse_frequencies(head_dim, 5e5)
    ratio = plain / theirs
    assert ratio[0] == 1
    assert ratio[-1] == pytest.approx(scaling.factor)
    assert ((ratio > 1.01) & (ratio < scaling.factor - 0.01)).any(), "some lie between"


@pytest.mark.parametrize("factor", [1.0, 0.5, 1.5, 2.0, 4.0, 8.0, 40.0])
def test_yarns_attention_factor_is_transformers_own(factor):
    _, theirs = of_transformers("yarn", 64, 1e4, factor=factor, original_max_position_embeddings=4096)
    assert torch.tensor(yarn_attention_factor(factor)) == torch.tensor(theirs)


@pytest.mark.parametrize("scaling", [LLAMA_3_2, QWEN2_5])
def test_table_equals_the_reference(scaling):
    assert_same_bits(rotary_table(500, 64, 1e6, scaling), reference.rotary_table(500, 64, 1e6, scaling))


def test_the_attention_factor_lengthens_every_pair():
    table = rotary_table(300, 64, 1e6, QWEN2_5)
    lengths = table[:, :32].square() + table[:, 32:].square()
    assert torch.allclose(lengths.sqrt(), torch.tensor(yarn_attention_factor(4.0)), atol=1e-6)
