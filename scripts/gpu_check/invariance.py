"""Invariance: that no bit depends on the batch, at the shapes of known models and through the whole engine."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from engine import LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.outputs import Completion
from kernels.gpu.attention import kv_store, paged_attention, split_attention, whole_attention
from kernels.gpu.linear import linear
from kernels.gpu.logprobs import sample, token_logprobs
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rotary import norm_and_rotary
from scripts.gpu_check.kernel_bench import products
from scripts.gpu_check.random_models import MODELS, TINY, random_engine, random_weights
from scripts.gpu_check.report import Row

NUM_ROWS = 300
BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, LENGTH = 16, 8, 128, 1100
SMALL = {**MODELS["qwen3-0.6b"], "num_hidden_layers": 4}  # its widths, and a quarter of a second per engine
NEEDLE = SamplingParams(max_tokens=24, seed=11, temperature=0.9, ignore_eos=True)


def invariance_rows(rows: list[Row]) -> None:
    """A row for each check: passed, or how it failed."""
    for name, check in checks():
        try:
            check()
        except Exception as error:
            rows.append({"check": name, "passed": False, "why": str(error)[:300] or type(error).__name__})
            if isinstance(error, TimeoutError):
                raise
        else:
            rows.append({"check": name, "passed": True})


def checks() -> Iterator[tuple[str, Callable[[], None]]]:
    for model in MODELS:
        yield f"every M from 1 to {NUM_ROWS}: linear layers of {model}", lambda model=model: check_linear(model)
        yield (
            f"every M from 1 to {NUM_ROWS}: head of {model}, draws equal trainer",
            lambda model=model: check_head(model),
        )
    yield f"every M from 1 to {NUM_ROWS}: norms and rotary", check_rows
    yield "attention: decode, chunks and splits equal prefill", check_attention
    yield "engine: a needle among 0, 1, 6, 40 and 200 others", check_needle
    yield "engine: chunks of 16, 100 and 1000 tokens; blocks of 16 and 64", check_chunks
    yield "engine: graphs equal eager steps", check_graphs
    yield "engine: decode equals the packed forward", check_packed
    yield "engine: new weights keep graphs valid", check_update
    yield "engine: float32 and a small llama", check_float32


def check_linear(model: str) -> None:
    for name, num_outputs, width, out_dtype in products(MODELS[model]):
        x, weight = randn(NUM_ROWS, width), randn(num_outputs, width)
        expected = linear(x, weight, out_dtype=out_dtype)
        for num_rows in range(1, NUM_ROWS + 1):
            require_same(
                linear(x[:num_rows], weight, out_dtype=out_dtype), expected[:num_rows], f"{name}, {num_rows} rows"
            )
        require_same(linear(x[77:], weight, out_dtype=out_dtype), expected[77:], f"{name}, from row 77")


def check_head(model: str) -> None:
    width, vocab_size = MODELS[model]["hidden_size"], MODELS[model]["vocab_size"]
    hidden, weight = randn(NUM_ROWS, width), randn(vocab_size, width, scale=width**-0.5)
    heat = torch.linspace(0.5, 2, NUM_ROWS, device="cuda")
    number = torch.arange(NUM_ROWS, device="cuda")
    entries = [number << 40, number * 3, number // 20, (number % 7 == 0).to(torch.uint8)]
    token_ids, logprobs = sample(hidden, weight, heat, number, *entries)
    require_same(token_logprobs(hidden, weight, token_ids, heat), logprobs, "trainer and engine")
    for n in range(1, NUM_ROWS + 1):
        rows = token_logprobs(hidden[:n], weight, token_ids[:n], heat[:n])
        require_same(rows, logprobs[:n], f"log-probabilities of {n} rows")
    for n in (1, 2, 33, 129, 257):
        first = sample(hidden[:n], weight, heat[:n], number[:n], *(entry[:n] for entry in entries))
        require_same(first[0], token_ids[:n], f"draws of {n} rows")
        require_same(first[1], logprobs[:n], f"log-probabilities of {n} draws")


def check_rows() -> None:
    x, delta = randn(NUM_ROWS, 2048, dtype=FLOAT32), randn(NUM_ROWS, 2048, dtype=FLOAT32)
    weight, head_weight = randn(2048, dtype=FLOAT32), randn(HEAD_DIM, dtype=FLOAT32)
    heads, table = randn(NUM_ROWS, 24, HEAD_DIM), randn(512, HEAD_DIM, dtype=FLOAT32)
    positions = torch.arange(NUM_ROWS, device="cuda")

    def turn(n: int) -> torch.Tensor:
        return norm_and_rotary(heads[:n], positions[:n], table, head_weight, head_weight, 16, 1e-6)

    normed, turned = add_rms_norm(x, delta, weight, 1e-6)[1], turn(NUM_ROWS)
    for n in range(1, NUM_ROWS + 1):
        require_same(add_rms_norm(x[:n], delta[:n], weight, 1e-6)[1], normed[:n], f"norm of {n} rows")
        require_same(turn(n), turned[:n], f"rotary of {n} rows")


def check_attention() -> None:
    q = randn(LENGTH, NUM_HEADS, HEAD_DIM)
    k, v = randn(LENGTH, NUM_KV_HEADS, HEAD_DIM), randn(LENGTH, NUM_KV_HEADS, HEAD_DIM)
    num_blocks = -(-LENGTH // 16)
    table = torch.randperm(num_blocks, device="cuda")
    keys = torch.full((num_blocks, NUM_KV_HEADS, 16, HEAD_DIM), float("nan"), device="cuda", dtype=BFLOAT16)
    values, place = keys.clone(), torch.arange(LENGTH, device="cuda")
    kv_store(k, v, keys, values, table[place // 16] * 16 + place % 16)

    def attend(run: Callable, *spans: tuple[int, int]) -> torch.Tensor:
        starts = torch.tensor([0, *(end - first for first, end in spans)], device="cuda").cumsum(0).int()
        ends = torch.tensor([end for _, end in spans], device="cuda", dtype=torch.int32)
        tables = table.int().expand(len(spans), -1).contiguous()
        rows = torch.cat([q[first:end] for first, end in spans])
        out = run(rows, keys, values, tables, starts, ends, HEAD_DIM**-0.5)
        return out[0] if isinstance(out, tuple) else out

    prefill = attend(whole_attention, (0, LENGTH))
    assert prefill.isfinite().all(), "slots that were never written were read"
    for run in (whole_attention, split_attention, paged_attention):
        singles = [(at, at + 1) for at in range(0, LENGTH, 3)]
        require_same(attend(run, *singles), prefill[::3], f"decode by {run.__name__}")
        for cut in (1, 64, 255, 256, 257, 700):
            require_same(attend(run, (cut, LENGTH)), prefill[cut:], f"chunk from {cut} by {run.__name__}")


def check_needle() -> None:
    engine = small_engine(max_num_seqs=256, num_blocks=2000)
    alone = needle(engine, 0)
    for num_others in (1, 6, 40, 200):
        require_equal(needle(engine, num_others), alone, f"among {num_others} others")
    engine.check_integrity()


def check_chunks() -> None:
    expected = needle(small_engine(), 0)
    for size in (16, 100, 1000):
        require_equal(needle(small_engine(max_num_batched_tokens=size), 5), expected, f"chunks of {size}")
    require_equal(needle(small_engine(block_size=64, num_blocks=200), 5), expected, "blocks of 64")


def check_graphs() -> None:
    for num_others in (0, 2, 30):
        captured, eager = needle(small_engine(), num_others), needle(small_engine(enforce_eager=True), num_others)
        require_equal(captured, eager, f"among {num_others} others")


def check_packed() -> None:
    engine, prompt = small_engine(), prompt_of(0)
    (completion,) = engine.generate([prompt], NEEDLE)[0]
    require_same(packed_logprobs(engine, prompt, completion), torch.tensor(completion.logprobs), "packed forward")


def check_update() -> None:
    engine = small_engine()
    before = needle(engine, 3)
    engine.update_weights(random_weights(engine.weight_shapes(), "cuda", seed=5), policy_version=1)
    after = needle(engine, 3)
    require_equal(after, needle(small_engine(seed=5, enforce_eager=True), 3), "after an update")
    assert after[0] != before[0], "the new weights show in no token"


def check_float32() -> None:
    engine, prompt = random_engine(TINY, device="cuda", numerics="float32"), prompt_of(0, TINY)
    (alone,) = engine.generate([prompt], NEEDLE)[0]
    group = engine.generate([prompt, *(prompt_of(i, TINY) for i in range(1, 20))], NEEDLE)[0][0]
    require_equal((group.token_ids, group.logprobs), (alone.token_ids, alone.logprobs), "among 19 others")
    require_same(packed_logprobs(engine, prompt, alone), torch.tensor(alone.logprobs), "packed forward")


def small_engine(**options: object) -> LLMEngine:
    defaults = {"num_blocks": 800, "max_num_seqs": 64, "max_model_len": 512, "max_num_batched_tokens": 2048}
    return random_engine(SMALL, device="cuda", **{**defaults, **options})


def needle(engine: LLMEngine, num_others: int) -> tuple[list[int], list[float]]:
    """Tokens and log-probabilities of one request among others of other lengths."""
    others = [SamplingParams(max_tokens=4 + i % 29, seed=i, ignore_eos=True) for i in range(num_others)]
    prompts = [prompt_of(i + 1) for i in range(num_others)]
    at = num_others // 2
    prompts.insert(at, prompt_of(0))
    params = [*others[:at], NEEDLE, *others[at:]]
    (completion,) = engine.generate(prompts, params)[at]
    return completion.token_ids, completion.logprobs


def prompt_of(i: int, model: dict = SMALL) -> list[int]:
    generator = torch.Generator().manual_seed(i)
    length = 150 if i == 0 else 5 + (i * 37) % 90
    return torch.randint(0, model["vocab_size"], (length,), generator=generator).tolist()


def packed_logprobs(engine: LLMEngine, prompt: list[int], completion: Completion) -> torch.Tensor:
    """Log-probabilities of a completion of NEEDLE from one packed forward, as a trainer computes them."""
    model, ops = engine.model_runner.model, engine.model_runner.ops
    input_ids = torch.tensor(prompt + completion.token_ids[:-1], device="cuda")
    attention = PackedAttention.from_segments(model.config, [Segment(start_row=0, end_row=len(input_ids))], ops)
    with torch.no_grad():
        hidden = model(input_ids, torch.arange(len(input_ids), device="cuda"), attention)[len(prompt) - 1 :]
        targets = torch.tensor(completion.token_ids, device="cuda")
        heat = torch.full((len(targets),), NEEDLE.temperature, device="cuda")
        return ops.token_logprobs(hidden, model.lm_head.packed, model.lm_head.num_outputs, targets, heat).cpu()


def randn(*shape: int, dtype: torch.dtype = BFLOAT16, scale: float = 1.0) -> torch.Tensor:
    """Numbers whose exponents differ much, so that the order of a sum shows in its bits."""
    generator = torch.Generator("cuda").manual_seed(sum(shape))
    exponents = torch.randint(-3, 4, shape, generator=generator, device="cuda")
    return (torch.ldexp(torch.randn(shape, generator=generator, device="cuda"), exponents) * scale).to(dtype)


def require_same(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    words = torch.int16 if actual.dtype is BFLOAT16 else torch.int64 if actual.dtype is torch.int64 else torch.int32
    num_different = (actual.contiguous().view(words) != expected.contiguous().view(words)).sum().item()
    assert num_different == 0, f"{what}: {num_different} of {actual.numel()} elements differ in bits"


def require_equal(actual: tuple[list, list], expected: tuple[list, list], what: str) -> None:
    assert actual[0] == expected[0], f"{what}: other tokens"
    assert actual[1] == expected[1], f"{what}: other log-probabilities"
