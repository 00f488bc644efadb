from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from model_families import FAMILIES

from engine.attention import PackedAttention, Segment
from engine.checkpoint import iter_weights
from engine.model import LM_HEAD, Transformer
from engine.model_config import ModelConfig
from kernels.linear import linear


def load(model_dir: Path, with_masters: bool = False) -> Transformer:
    model = Transformer(ModelConfig.from_directory(model_dir), with_masters=with_masters)
    model.load_weights(iter_weights(model_dir))
    return model


def logits(model: Transformer, token_ids: torch.Tensor) -> torch.Tensor:
    attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=len(token_ids))], model.ops)
    hidden = model(token_ids, torch.arange(len(token_ids)), attention)
    head = model.lm_head
    return linear(hidden, head.packed, head.num_outputs, None, head.master)


def reference_model(model_dir: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_logprobs_and_gradients_equal_those_of_transformers(
    tiny_model_dir: Callable[..., Path], family: str, overrides: dict[str, Any]
) -> None:
    model_dir = tiny_model_dir(family, **overrides)
    token_ids = torch.randint(3, 300, (40,), generator=torch.Generator().manual_seed(1))
    ours, theirs = load(model_dir, with_masters=True), reference_model(model_dir)
    our_logprobs = logits(ours, token_ids).log_softmax(-1)
    their_logprobs = theirs(token_ids[None]).logits[0].log_softmax(-1)
    assert (our_logprobs - their_logprobs).abs().max() < 1e-4
    weight = torch.randn(our_logprobs.shape, generator=torch.Generator().manual_seed(2))
    (our_logprobs * weight).sum().backward()
    (their_logprobs * weight).sum().backward()
    expected = theirs.model.layers[0].self_attn.k_proj.weight.grad
    num_q = ours.config.num_heads * ours.config.head_dim
    got = ours.layers[0].attention.qkv.master.grad[num_q : num_q + expected.shape[0]]
    assert (got - expected).norm() < 1e-3 * expected.norm()
    got, expected = ours.embedding.master.grad, theirs.model.embed_tokens.weight.grad
    assert (got - expected).norm() < 1e-3 * expected.norm()


def test_a_model_without_rope_does_not_see_positions(tiny_model_dir: Callable[..., Path]) -> None:
    def hidden(no_rope_layers: list[int], first_position: int) -> torch.Tensor:
        model = load(tiny_model_dir("smollm3", no_rope_layers=no_rope_layers))
        attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=30)], model.ops)
        return model(torch.arange(5, 35), torch.arange(30) + first_position, attention)

    assert torch.equal(hidden([0, 0], first_position=0), hidden([0, 0], first_position=100))
    assert not torch.equal(hidden([0, 1], first_position=0), hidden([0, 1], first_position=100))


def test_the_table_of_models_lists_the_models_tested_here() -> None:
    table = (Path(__file__).parents[2] / "docs" / "models.md").read_text().split("Every tiny model")[0]
    last_column = " ".join(line.split("|")[-2] for line in table.splitlines() if "ForCausalLM" in line)
    assert sorted(re.findall(r"`(\S+)`", last_column)) == sorted(family.id for family in FAMILIES)


def check_greedy(model_dir: Path, num_prompts: int, num_tokens: int) -> None:
    """Greedy tokens agree, except from a place on where transformers' own two best logits lie within 1e-4."""
    from engine import EngineConfig, LLMEngine, SamplingParams

    theirs = reference_model(model_dir)
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 300, (8 + i,), generator=generator).tolist() for i in range(num_prompts)]
    engine = LLMEngine(EngineConfig(str(model_dir), num_blocks=1000))
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    num_compared = 0
    for prompt, (completion,) in zip(prompts, engine.generate(prompts, params), strict=True):
        with torch.no_grad():
            scores = theirs(torch.tensor([prompt + completion.token_ids[:-1]])).logits[0, len(prompt) - 1 :]
        best = scores.topk(2)
        for i, token_id in enumerate(completion.token_ids):
            if token_id != best.indices[i, 0]:
                assert best.values[i, 0] - scores[i, token_id] < 1e-4
            logprob = scores[i].log_softmax(-1)[token_id].item()
            assert abs(logprob - completion.logprobs[i]) < 1e-3
            num_compared += 1
    assert num_compared == num_prompts * num_tokens


@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_greedy_tokens_are_those_of_transformers(
    tiny_model_dir: Callable[..., Path], family: str, overrides: dict[str, Any]
) -> None:
    check_greedy(tiny_model_dir(family, **overrides), num_prompts=4, num_tokens=16)


@pytest.mark.slow
def test_greedy_tokens_are_those_of_transformers_on_smollm2(smollm2_dir: Path) -> None:
    check_greedy(smollm2_dir, num_prompts=32, num_tokens=64)


def addresses(model: Transformer) -> dict[str, int]:
    return {name: tensor.data_ptr() for name, tensor in [*model.named_parameters(), *model.named_buffers()]}


def test_weights_are_replaced_in_place_and_come_back_as_they_went_in(tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir("qwen2"))
    before = addresses(model)
    new = {name: torch.randn(shape) for name, shape in model.weight_shapes().items()}
    checksum = model.load_weights(new.items())
    assert addresses(model) == before
    for name, tensor in model.named_weights():
        assert torch.equal(tensor, new[name]), name
    assert model.load_weights(iter(reversed(new.items()))) == checksum
    one_bit = {**new, "model.norm.weight": new["model.norm.weight"].clone()}
    one_bit["model.norm.weight"].view(torch.int32)[3] ^= 1
    assert model.load_weights(one_bit) != checksum


def spoil(weights: dict[str, torch.Tensor], how: str) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    if how == "missing":
        del weights[name]
    elif how == "unknown":
        weights["model.layers.7.mlp.up_proj.weight"] = weights[name]
    elif how == "of shape":
        weights[name] = weights[name][:-1]
    elif how == "NaN":
        weights[name][3, 4] = float("nan")
    elif how == "infinite":
        weights[name][0, 0] = -float("inf")
    elif how == "float":
        weights[name] = weights[name].to(torch.int32)


@pytest.mark.parametrize("how", ["missing", "unknown", "of shape", "NaN", "infinite", "float"])
def test_bad_weights_are_refused_whole(tiny_model_dir: Callable[..., Path], how: str) -> None:
    model = load(tiny_model_dir())
    before = {name: tensor.clone() for name, tensor in model.named_weights()}
    bad = {name: torch.randn(shape) for name, shape in model.weight_shapes().items()}
    spoil(bad, how)
    with pytest.raises(ValueError, match=how):
        model.load_weights(bad)
    for name, tensor in model.named_weights():
        assert torch.equal(tensor, before[name])


def test_a_weight_given_twice_is_refused(tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir())
    pairs = list(model.named_weights())
    with pytest.raises(ValueError, match="twice"):
        model.load_weights(pairs + pairs[:1])


def test_a_tied_model_takes_a_head_only_if_it_is_the_embedding(tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir())
    weights = dict(model.named_weights())
    without_head = model.load_weights(weights)
    assert model.load_weights({**weights, LM_HEAD: weights["model.embed_tokens.weight"]}) == without_head
    with pytest.raises(ValueError, match="tie_word_embeddings"):
        model.load_weights({**weights, LM_HEAD: weights["model.embed_tokens.weight"] + 1})


def test_repack_brings_the_forward_up_to_date_with_the_masters(tiny_model_dir: Callable[..., Path]) -> None:
    trained = load(tiny_model_dir(), with_masters=True)
    token_ids = torch.arange(5, 30)
    before = logits(trained, token_ids).detach()
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.add_(0.01 * torch.ones_like(parameter))
    trained.repack()
    engine_model = load(tiny_model_dir())
    engine_model.load_weights(trained.named_weights())
    after = logits(trained, token_ids).detach()
    assert torch.equal(after, logits(engine_model, token_ids))
    assert not torch.equal(after, before)
