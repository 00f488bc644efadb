from __future__ import annotations

import pytest
import rank_jobs
import torch

from trainers import Policy
from trainers.batch import pack_tokens

FAMILIES = ("llama", "qwen2", "qwen3", "smollm3")
PROMPTS = [list(range(5, 25)), [7]]
COMPLETIONS = [[list(range(40, 60)), [3, 4]], [list(range(100, 130))]]


def logprobs_and_gradients(model: str, **options):
    policy = Policy(model, num_threads=1, **options)
    logprobs = policy.token_logprobs(pack_tokens(PROMPTS, COMPLETIONS))
    (logprobs * torch.linspace(-1, 1, logprobs.numel())).sum().backward()
    return logprobs.detach(), {name: parameter.grad for name, parameter in policy.model.named_parameters()}


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_recomputed_layers_give_the_same_bits(tiny_model_dir, family, numerics):
    model = str(tiny_model_dir(family))
    logprobs, gradients = logprobs_and_gradients(model, numerics=numerics)
    recomputed, others = logprobs_and_gradients(model, numerics=numerics, gradient_checkpointing=True)
    assert torch.equal(recomputed, logprobs)
    assert others.keys() == gradients.keys()  # the parameters' names are the same
    assert all(torch.equal(others[name], gradient) for name, gradient in gradients.items())
    assert all(gradient.abs().max() > 0 for gradient in gradients.values())


@pytest.mark.slow
def test_recomputed_layers_take_less_memory(tiny_model_dir, tmp_path):
    model = str(
        tiny_model_dir(
            "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=16, head_dim=64,
            max_position_embeddings=2048,
        )
    )  # fmt: skip
    (kept,) = rank_jobs.run_ranks(tmp_path, rank_jobs.peak_bytes_of_a_step, 1, model=model)
    (recomputed,) = rank_jobs.run_ranks(
        tmp_path, rank_jobs.peak_bytes_of_a_step, 1, model=model, gradient_checkpointing=True
    )
    assert recomputed < 0.5 * kept
