"""The engine on the GPU's kernels: by Triton's interpreter here, on the device with `-m gpu`."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.captured_steps import MAX_GRAPH_ROWS, padded_num_rows
from engine.memory import device_bytes_left, usable_device_bytes, weight_bytes
from engine.model_config import ModelConfig
from engine.outputs import Completion
from scripts.gpu_check import invariance
from scripts.gpu_check.random_models import MODELS, TINY, random_engine, random_weights

QWEN3 = {**TINY, "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
SMOLLM3 = {**TINY, "architectures": ["SmolLM3ForCausalLM"], "no_rope_layers": [1, 0]}
PARAMS = SamplingParams(max_tokens=3, seed=5, temperature=0.8)


no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU: there is no interpreter")


def prompt_of(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, TINY["vocab_size"], (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def interpreted(model=TINY, **options) -> LLMEngine:
    return random_engine(model, device="interpreter", num_blocks=80, max_num_seqs=4, max_model_len=128, **options)


def bits(completion: Completion) -> tuple[list[int], list[int]]:
    return completion.token_ids, torch.tensor(completion.logprobs).view(torch.int32).tolist()


def forward_logprobs(engine: LLMEngine, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """Log-probabilities of a completion from one packed forward, as a trainer computes them."""
    model, ops, device = engine.model_runner.model, engine.model_runner.ops, engine.model_runner.ops.device
    input_ids = torch.tensor(prompt + completion.token_ids[:-1], device=device)
    segments = [Segment(start_row=0, end_row=len(input_ids))]
    attention = PackedAttention.from_segments(model.config, segments, ops)
    with torch.no_grad():
        hidden = model(input_ids, torch.arange(len(input_ids), device=device), attention)[len(prompt) - 1 :]
        targets = torch.tensor(completion.token_ids, device=device)
        heat = torch.full((len(targets),), temperature, device=device)
        head = model.lm_head
        return ops.token_logprobs(hidden, head.packed, head.num_outputs, targets, heat).cpu()


@no_gpu
@pytest.mark.parametrize(
    ("model", "numerics"),
    [
        (TINY, "float32"),
        pytest.param(QWEN3, "bfloat16", marks=pytest.mark.slow),
        pytest.param(SMOLLM3, "float32", marks=pytest.mark.slow),
    ],
)
def test_decode_among_others_equals_the_packed_forward(model, numerics):
    engine = interpreted(model, numerics=numerics, max_num_batched_tokens=16)
    prompts = [prompt_of(21), prompt_of(3, seed=1), prompt_of(5, seed=2)]  # decode steps of 3 rows are filled up to 4
    together = [group[0] for group in engine.generate(prompts, PARAMS)]
    engine.check_integrity()
    for prompt, completion in zip(prompts, together):
        trained = forward_logprobs(engine, prompt, completion, PARAMS.temperature)
        assert bits(dataclasses.replace(completion, logprobs=trained.tolist())) == bits(completion)
    (alone,) = interpreted(model, numerics=numerics).generate([prompts[0]], PARAMS)
    assert bits(alone[0]) == bits(together[0])


@no_gpu
@pytest.mark.slow
def test_prompt_logprobs_equal_the_packed_forward():
    engine, prompt = interpreted(numerics="float32", max_num_batched_tokens=8), prompt_of(11)
    asked = SamplingParams(max_tokens=1, prompt_logprobs=2)
    [[completion]] = engine.generate([prompt], asked)
    for position, entry in enumerate(completion.prompt_logprobs[1:], start=1):
        assert prompt[position] in entry
        for token_id, logprob in entry.items():
            drawn = dataclasses.replace(completion, token_ids=[token_id], logprobs=[logprob])
            assert forward_logprobs(engine, prompt[:position], drawn, 1.0).tolist() == [logprob]
        assert list(entry.values())[:2] == sorted(entry.values(), reverse=True)[:2]


@no_gpu
@pytest.mark.slow
def test_steps_planned_ahead_and_cycles_of_steps_draw_the_same():
    prompts, params = [prompt_of(5), prompt_of(3, seed=1)], SamplingParams(n=2, max_tokens=5, seed=5)
    plain = interpreted(numerics="float32", async_scheduling=False).generate(prompts, params)
    ahead = interpreted(numerics="float32", async_scheduling=True, num_scheduler_steps=2).generate(prompts, params)
    assert [[bits(one) for one in group] for group in ahead] == [[bits(one) for one in group] for group in plain]


@no_gpu
def test_logprobs_are_near_those_of_the_cpu():
    params = SamplingParams(max_tokens=3, temperature=0.0)
    (ours,), (theirs,) = (
        engine.generate([prompt_of(9)], params)[0]
        for engine in (interpreted(numerics="float32"), random_engine(TINY, device="cpu", num_blocks=80))
    )
    assert ours.token_ids == theirs.token_ids
    assert torch.allclose(torch.tensor(ours.logprobs), torch.tensor(theirs.logprobs), atol=1e-5)


@no_gpu
def test_groups_share_a_prompt_and_new_weights_are_used():
    engine = interpreted(numerics="float32")
    prompt, params = prompt_of(5), SamplingParams(n=3, max_tokens=2, seed=1)
    before = engine.generate([prompt], params)[0]
    engine.update_weights(random_weights(engine.weight_shapes(), "cpu", seed=7), policy_version=1)
    after = engine.generate([prompt], params)[0]
    fresh = interpreted(numerics="float32", seed=7).generate([prompt], params)[0]
    assert [bits(one) for one in after] == [bits(one) for one in fresh] != [bits(one) for one in before]
    engine.check_integrity()


@no_gpu
def test_truncated_samples_and_plain_ones_share_a_step():
    engine = interpreted(numerics="float32")
    prompts = [prompt_of(4), prompt_of(6, seed=1)]
    truncated = SamplingParams(max_tokens=2, seed=3, top_k=2, logprobs=2)
    plain = SamplingParams(max_tokens=2, seed=3)
    together = [group[0] for group in engine.generate(prompts, [truncated, plain])]
    assert len(together[0].top_logprobs[0]) == 2
    assert bits(interpreted(numerics="float32").generate([prompts[1]], plain)[0][0]) == bits(together[1])


def test_every_number_of_rows_has_a_graph_that_is_not_much_larger():
    sizes = [padded_num_rows(n) for n in range(1, MAX_GRAPH_ROWS + 1)]
    assert all(n <= size <= max(2 * n, n + 8, 1.13 * n) for n, size in enumerate(sizes, start=1))
    assert all(a <= b for a, b in itertools.pairwise(sizes))
    assert len(set(sizes)) <= 40  # each costs a capture
    assert padded_num_rows(256) == 256
    assert padded_num_rows(MAX_GRAPH_ROWS + 1) == MAX_GRAPH_ROWS + 1


def test_weights_are_counted_before_they_are_there():
    config = ModelConfig.from_dict(MODELS["qwen3-1.7b"])
    assert 3.4e9 < weight_bytes(config, torch.bfloat16) < 3.5e9
    assert 60e9 < device_bytes_left(72 * 10**9, 8192, config, torch.bfloat16) < 68e9
    assert device_bytes_left(4 * 10**9, 8192, config, torch.bfloat16) < 0


def test_an_engine_takes_its_share_of_a_gpu_and_leaves_what_others_have():
    assert usable_device_bytes(free=80 * 10**9, total=80 * 10**9, utilization=0.9) == 72 * 10**9
    assert usable_device_bytes(free=80 * 10**9, total=80 * 10**9, utilization=0.45) == 36 * 10**9
    assert usable_device_bytes(free=20 * 10**9, total=80 * 10**9, utilization=0.45) == 18 * 10**9


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "interpreter", "numerics": "bfloat16-dot"}, "^numerics='bfloat16-dot' is a profile of the CPU"),
        ({"device": "interpreter", "kv_cache_dtype": "float32"}, "^kv_cache_dtype='float32'"),
        ({"device": "tpu"}, "^device='tpu'"),
        ({"gpu_memory_utilization": 1.5}, "^gpu_memory_utilization=1.5 must be above 0 and at most 1"),
        ({"enforce_eager": 1}, "^enforce_eager=1"),
    ],
)
def test_options_that_do_not_fit_the_device_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        EngineConfig("m", **options)


@no_gpu
def test_without_a_gpu_auto_is_the_cpu_and_cuda_an_error():
    assert (EngineConfig("m").device_name, EngineConfig("m").profile_name) == ("cpu", "float32")
    assert EngineConfig("m", device="interpreter").profile_name == "gpu-bfloat16"
    assert EngineConfig("m", device="interpreter", numerics="float32").profile_name == "gpu-float32"
    with pytest.raises(ValueError, match="is not available: torch finds no CUDA device"):
        EngineConfig("m", device="cuda")


ENGINE_CHECKS = {name: check for name, check in invariance.checks() if name.startswith("engine: ")}


@pytest.mark.gpu
@pytest.mark.parametrize("name", ENGINE_CHECKS)
def test_on_a_device(name):
    """A needle among others, chunks, graphs against eager steps, the packed forward, updates under valid graphs."""
    ENGINE_CHECKS[name]()
