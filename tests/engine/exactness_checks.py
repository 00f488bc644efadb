"""Engines, requests, runs and comparisons that the tests of exactness share."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from engine.attention import PackedAttention, Segment
from engine.checkpoint import iter_weights
from engine.model import Transformer
from engine.model_config import ModelConfig

# Wide enough that sums over k span several blocks of 128, the last one ragged: else any order of summation would do.
TINY = {
    "hidden_size": 288,
    "head_dim": 32,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 520,
}
NEEDLE = SamplingParams(max_tokens=20, seed=11, temperature=0.9, ignore_eos=True)
PROMPT_LENGTH = 45

Requests = dict[str, tuple[list[int], SamplingParams]]
Bits = tuple[list[int], list[int]]


class Setting(NamedTuple):
    """A model and the numerics profile that engine and trainer run it in."""

    model_dir: Path
    numerics: str


def make_engine(setting: Setting, **options: Any) -> LLMEngine:
    defaults = {"num_blocks": 600, "num_threads": 2, "numerics": setting.numerics}
    return LLMEngine(EngineConfig(str(setting.model_dir), **{**defaults, **options}))


def prompt_of(seed: int, length: int = PROMPT_LENGTH) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 300) for _ in range(length)]


def random_mates(count: int, seed: int) -> Requests:
    generator = random.Random(seed)
    return {
        f"mate-{i}": (
            prompt_of(1000 * seed + i, generator.randrange(1, 120)),
            SamplingParams(
                max_tokens=generator.randrange(1, 30), temperature=generator.choice([0.0, 0.7, 1.0]), seed=i,
                n=generator.choice([1, 1, 3]), ignore_eos=True,
            ),
        )
        for i in range(count)
    }  # fmt: skip


def bits(completion: Completion) -> Bits:
    return completion.token_ids, float_bits(completion.logprobs)


def float_bits(values: Sequence[float] | torch.Tensor) -> list[int]:
    return torch.as_tensor(values, dtype=torch.float32).view(torch.int32).tolist()


def all_bits(done: Mapping[str, Iterable[Completion]]) -> dict[str, list[Bits]]:
    return {request_id: list(map(bits, completions)) for request_id, completions in done.items()}


def bits_by_sample(completions: Iterable[Completion]) -> dict[tuple[str, int], Bits]:
    return {(completion.request_id, completion.index): bits(completion) for completion in completions}


def run(engine: LLMEngine, requests: Requests) -> dict[str, list[Completion]]:
    """Completions by request id, sorted by index; all requests arrive at once."""
    for request_id, (prompt, params) in requests.items():
        engine.add_request(request_id, prompt, params)
    return drain(engine, list(requests))


def drain(engine: LLMEngine, request_ids: Iterable[str]) -> dict[str, list[Completion]]:
    done: dict[str, list[Completion]] = {request_id: [] for request_id in request_ids}
    while engine.has_unfinished():
        for completion in engine.step().finished:
            done[completion.request_id].append(completion)
    engine.check_integrity()
    return {request_id: sorted(completions, key=lambda c: c.index) for request_id, completions in done.items()}


def run_one(engine: LLMEngine, prompt: list[int], params: SamplingParams = NEEDLE) -> Completion:
    """The completion of one request by itself."""
    return run(engine, {"one": (prompt, params)})["one"][0]


def alone(setting: Setting, **options: Any) -> Bits:
    """What the needle gives in an engine of its own."""
    return bits(run_one(make_engine(setting, **options), prompt_of(0)))


def load_trainer_model(setting: Setting) -> Transformer:
    model = Transformer(ModelConfig.from_directory(setting.model_dir), setting.numerics, with_masters=True)
    model.load_weights(iter_weights(setting.model_dir))
    return model


def trainer_logprobs(model: Transformer, prompt: list[int], completion: Completion, temperature: float) -> torch.Tensor:
    """Log-probabilities of a completion from one packed forward of the trainer's model, with autograd on."""
    input_ids = prompt + completion.token_ids[:-1]
    rows = range(len(prompt) - 1, len(input_ids))
    segments = [Segment(start_row=0, end_row=len(input_ids))]
    return packed_logprobs(model, input_ids, range(len(input_ids)), segments, rows, completion.token_ids, temperature)


def group_logprobs(
    model: Transformer, prompt: list[int], completions: Sequence[Completion], temperature: float
) -> list[torch.Tensor]:
    """The same for the samples of one prompt, which is laid down once and shared."""
    input_ids, positions, rows, targets = [*prompt], [*range(len(prompt))], [], []
    segments = [Segment(start_row=0, end_row=len(prompt))]
    for completion in completions:
        start, end = len(input_ids), len(input_ids) + len(completion.token_ids) - 1
        input_ids += completion.token_ids[:-1]
        positions += range(len(prompt), len(prompt) + end - start)
        segments += [Segment(start_row=start, end_row=end, parent=0)] if end > start else []
        rows += [len(prompt) - 1, *range(start, end)]
        targets += completion.token_ids
    logprobs = packed_logprobs(model, input_ids, positions, segments, rows, targets, temperature)
    return list(logprobs.split([len(completion.token_ids) for completion in completions]))


def packed_logprobs(
    model: Transformer,
    input_ids: Sequence[int],
    positions: Sequence[int],
    segments: list[Segment],
    rows: Sequence[int],
    targets: Sequence[int],
    temperature: float,
) -> torch.Tensor:
    attention = PackedAttention.from_segments(model.config, segments, model.ops)
    hidden = model(torch.tensor(input_ids), torch.tensor(positions), attention)[torch.tensor(rows)]
    assert hidden.requires_grad
    temperatures, head = torch.full((len(rows),), temperature), model.lm_head
    return model.ops.token_logprobs(
        hidden, head.packed, head.num_outputs, torch.tensor(targets), temperatures, head.master
    ).detach()


def perturbed(setting: Setting, scale: float) -> dict[str, torch.Tensor]:
    """New float32 weights near the model's, none of which is a bfloat16 number but by accident."""
    generator = torch.Generator().manual_seed(5)
    return {
        name: tensor.float() + scale * torch.randn(tensor.shape, generator=generator)
        for name, tensor in iter_weights(setting.model_dir)
    }


def spread_weights(setting: Setting) -> dict[str, torch.Tensor]:
    """The model's weights with exponents up to 2^12 apart and the mean square they had, so that order shows in sums."""
    generator = torch.Generator().manual_seed(6)
    weights = {}
    for name, tensor in iter_weights(setting.model_dir):
        spread = torch.ldexp(tensor.float(), torch.randint(-6, 7, tensor.shape, generator=generator))
        weights[name] = spread * (tensor.float().square().mean() / spread.square().mean()).sqrt()
    return weights


def stored_keys_and_values(engine: LLMEngine, request_id: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(keys, values), [L, T, K, H], as the pool holds them for a running request of one sample."""
    [request] = [r for r in engine.scheduler.running if r.request_id == request_id]
    runner, blocks = engine.model_runner, torch.tensor(request.block_ids)
    keys = runner.key_blocks[:, blocks].permute(0, 1, 4, 2, 3).flatten(1, 2)  # from [L, P, K, H, S]
    values = runner.value_blocks[:, blocks].permute(0, 1, 3, 2, 4).flatten(1, 2)  # from [L, P, K, S, H]
    return keys[:, : request.num_computed_tokens], values[:, : request.num_computed_tokens]
