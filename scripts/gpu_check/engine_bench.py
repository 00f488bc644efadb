"""Whole-engine benchmarks: random weights in the shapes of known models, all requests arriving at once."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch

from engine import LLMEngine, SamplingParams
from engine.memory import block_bytes, weight_bytes
from engine.model_config import ModelConfig
from engine.ops import Ops
from scripts.gpu_check.card import Card, device_seconds
from scripts.gpu_check.random_models import MODELS, random_engine
from scripts.gpu_check.report import Row
from scripts.gpu_check.torch_ops import TorchOps

NUM_REQUESTS, PROMPT_TOKENS, NEW_TOKENS = 256, 128, 512
CONTEXT = PROMPT_TOKENS + NEW_TOKENS
WARM_UP_TOKENS = 16  # prompts take five steps; then graphs of all sizes that the end will need are captured
BFLOAT16 = torch.bfloat16


def throughput_rows(card: Card, model: str, rows: list[Row]) -> None:
    """Tokens per second of the invariant engine and of the same with cuBLAS; decode alone against the floor."""
    own: list[Row] = []
    for name, ops in (("invariant", None), ("cuBLAS", TorchOps())):
        own.append({"model": model, "engine": name, **throughput(card, model, ops)})
        rows.append(own[-1])
        collect_memory()
    own[0]["invariant_over_cublas"] = own[0]["seconds"] / own[1]["seconds"]


def throughput(card: Card, model: str, ops: Ops | None) -> Row:
    engine = bench_engine(model, ops)
    run(engine, WARM_UP_TOKENS, seed=1)
    seconds, decode = run(engine, NEW_TOKENS, seed=2)
    floor = step_floor(card, MODELS[model], PROMPT_TOKENS + NEW_TOKENS // 2)  # in the middle, where the median is
    return {
        "tokens_per_s": NUM_REQUESTS * NEW_TOKENS / seconds, "seconds": seconds, "decode_step_ms": decode * 1e3,
        "floor_ms": floor * 1e3, "share_of_floor": floor / decode,
    }  # fmt: skip


def device_step_rows(card: Card, model: str, rows: list[Row]) -> None:
    """What a decode step of 256 requests takes on the device at a full context, in each engine."""
    variants: tuple[tuple[str, Ops | None, int], ...] = (
        ("invariant", None, 16),
        ("cuBLAS", TorchOps(), 16),
        ("cuBLAS and SDPA", TorchOps(sdpa_rows=NUM_REQUESTS), CONTEXT),
    )
    own: list[Row] = []
    for name, ops, block_size in variants:
        own.append({"model": model, "engine": name, **device_step(card, model, ops, block_size)})
        rows.append(own[-1])
        collect_memory()
        for key in ("layers_ms", "step_ms"):
            own[-1][f"invariant_over_this_{key.removesuffix('_ms')}"] = own[0][key] / own[-1][key]


def device_step(card: Card, model: str, ops: Ops | None, block_size: int) -> Row:
    engine = bench_engine(model, ops, block_size=block_size, max_num_batched_tokens=NUM_REQUESTS * CONTEXT)
    new_tokens = 6  # all prompts at once, a step that compiles, a step that is captured, and some more
    run(engine, new_tokens, seed=1, prompt_tokens=CONTEXT - new_tokens)
    layers, draw = time_last_step(engine)
    floor = step_floor(card, MODELS[model], CONTEXT)
    return {
        "context": CONTEXT, "layers_ms": layers * 1e3, "draw_ms": draw * 1e3, "step_ms": (layers + draw) * 1e3,
        "floor_ms": floor * 1e3, "share_of_floor": floor / (layers + draw),
    }  # fmt: skip


def bench_engine(model: str, ops: Ops | None, *, block_size: int = 16, max_num_batched_tokens: int = 8192) -> LLMEngine:
    """With as many blocks as the scheduler wants to see before it lets all requests in; without a prefix cache."""
    return random_engine(
        MODELS[model], ops=ops, device="cuda", max_num_seqs=NUM_REQUESTS, max_model_len=CONTEXT, block_size=block_size,
        num_blocks=NUM_REQUESTS * (CONTEXT // block_size + 1), max_num_batched_tokens=max_num_batched_tokens,
        enable_prefix_caching=False,
    )  # fmt: skip


def run(engine: LLMEngine, new_tokens: int, *, seed: int, prompt_tokens: int = PROMPT_TOKENS) -> tuple[float, float]:
    """(seconds for everything, median seconds of a step in which all requests decode)."""
    generator = torch.Generator().manual_seed(seed)
    vocab_size = engine.model_config.vocab_size
    prompts = torch.randint(0, vocab_size, (NUM_REQUESTS, prompt_tokens), generator=generator).tolist()
    params = SamplingParams(max_tokens=new_tokens, ignore_eos=True)
    torch.cuda.synchronize()
    began = time.perf_counter()
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{seed}-{i}", prompt, params)
    decode_steps, num_finished = [], 0
    while engine.has_unfinished():
        before = time.perf_counter()
        num_scheduled = engine.stats().num_scheduled_tokens
        output = engine.step()
        num_finished += len(output.finished)
        if engine.stats().num_scheduled_tokens - num_scheduled == len(output.new_tokens) == NUM_REQUESTS:
            decode_steps.append(time.perf_counter() - before)
    seconds = time.perf_counter() - began
    assert num_finished == NUM_REQUESTS, f"{num_finished} of {NUM_REQUESTS} requests finished"
    return seconds, statistics.median(decode_steps)


def time_last_step(engine: LLMEngine) -> tuple[float, float]:
    """(seconds of the layers, of the draws) of the last decode step, run again on the device."""
    runner, head = engine.model_runner, engine.model_runner.model.lm_head
    heat = torch.ones(NUM_REQUESTS, device="cuda")
    draws = torch.arange(NUM_REQUESTS, device="cuda").repeat(5, 1)
    draws[4] = 0
    with torch.inference_mode():
        layers = device_seconds(runner.steps.replay, NUM_REQUESTS)
        hidden = runner.steps.replay(NUM_REQUESTS)
        return layers, device_seconds(runner.ops.draw, hidden, head.packed, heat, draws)


def step_floor(card: Card, model: Mapping[str, Any], context: int) -> float:
    """Seconds to read every weight and every key and value once."""
    config = ModelConfig.from_dict(model)
    kv_bytes = NUM_REQUESTS * context * block_bytes(config, 1, BFLOAT16)
    return card.floor_seconds(weight_bytes(config, BFLOAT16) + kv_bytes)


def collect_memory() -> None:
    """Gives back what an engine that nobody holds any more had on the device."""
    gc.collect()
    torch.cuda.empty_cache()
