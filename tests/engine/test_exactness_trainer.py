"""Decode, prefill and the trainer's forward are one computation; with an operation of torch's in it they are not."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from exactness_checks import (
    Setting,
    bits,
    float_bits,
    group_logprobs,
    load_trainer_model,
    make_engine,
    prompt_of,
    random_mates,
    run,
    run_one,
    spread_weights,
    stored_keys_and_values,
    trainer_logprobs,
)
from model_families import FAMILIES
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import kernels
from engine import SamplingParams
from engine.attention import PackedAttention, Segment
from kernels.build import available_instruction_sets, library_path
from kernels.library import library
from kernels.linear import linear
from kernels.profiles import PROFILES


@pytest.mark.parametrize("numerics", PROFILES)
@pytest.mark.parametrize(("family", "overrides"), FAMILIES)
def test_decode_equals_prefill_equals_the_trainers_forward(
    tiny_model_dir: Callable[..., Path], family: str, overrides: dict[str, Any], numerics: str
) -> None:
    check_three_way(Setting(tiny_model_dir(family, **overrides), numerics))


@pytest.mark.slow
@pytest.mark.parametrize("numerics", PROFILES)
def test_decode_equals_prefill_equals_the_trainers_forward_on_smollm2(smollm2_dir: Path, numerics: str) -> None:
    check_three_way(Setting(smollm2_dir, numerics))


def check_three_way(setting: Setting) -> None:
    """A prompt in chunks and recorded decode steps, prefills with and without a cached prefix, and the trainer."""
    prompt = prompt_of(9)
    engine = make_engine(setting, max_num_batched_tokens=16)
    decoded = run_one(engine, prompt, SamplingParams(max_tokens=24, seed=1, ignore_eos=True))
    recording, config = engine.model_runner.steps.recording(1), engine.model_runner.config
    num_turning = sum(config.has_rope(layer) for layer in range(config.num_layers))
    assert [name for name, _ in recording.calls].count("ls_rotary") == num_turning
    for length in (1, 5, 17):  # a prefill up to there must draw the same next token with the same log-probability
        prefix = prompt + decoded.token_ids[:length]
        params = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
        assert bits(run_one(make_engine(setting), prefix, params)) == bits(run_one(engine, prefix, params))
    assert engine.stats().prefix_cache_hits >= 3 * 32
    trainer = trainer_logprobs(load_trainer_model(setting), prompt, decoded, temperature=1.0)
    assert float_bits(trainer) == float_bits(decoded.logprobs)


def test_decode_equals_the_prefill_of_every_prefix(tiny_setting: Setting) -> None:
    greedy = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    token_ids, logprobs = bits(run_one(make_engine(tiny_setting), prompt_of(9, 30), greedy))
    first_only = SamplingParams(max_tokens=1, temperature=0.0, ignore_eos=True)
    for length in range(40):
        engine = make_engine(tiny_setting, enable_prefix_caching=False)
        prefilled = run_one(engine, prompt_of(9, 30) + token_ids[:length], first_only)
        assert bits(prefilled) == ([token_ids[length]], [logprobs[length]]), f"a prefix of {length} tokens"


def test_the_keys_and_values_of_decode_are_those_of_prefill(tiny_setting: Setting) -> None:
    def stored(prompt: list[int], num_steps: int, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
        engine = make_engine(tiny_setting, **options)
        engine.add_request("r", prompt, SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
        for _ in range(num_steps):
            engine.step()
        return stored_keys_and_values(engine, "r")

    prompt = prompt_of(9, 30)
    completion = run_one(make_engine(tiny_setting), prompt, SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
    decoded = stored(prompt, num_steps=51)  # one for the prompt, fifty for tokens
    whole = stored(prompt + completion.token_ids[:50], num_steps=1)
    chunked = stored(prompt + completion.token_ids[:50], num_steps=16, max_num_batched_tokens=5, block_size=48)
    for one, other, third in zip(decoded, whole, chunked):
        assert one.shape[1] == 80
        assert one.dtype is PROFILES[tiny_setting.numerics].kv_dtype
        assert torch.equal(one, other)
        assert torch.equal(one, third)


def test_the_trainers_forward_does_not_depend_on_its_number_of_rows(tiny_setting: Setting) -> None:
    check_rows_of_the_trainer(tiny_setting, [*range(1, 40), 64, 100, 127, 128, 129, 200, 256, 257, 299])


@pytest.mark.slow
def test_the_trainers_forward_is_the_same_at_every_number_of_rows_up_to_300(tiny_setting: Setting) -> None:
    check_rows_of_the_trainer(tiny_setting, range(1, 301))


def check_rows_of_the_trainer(setting: Setting, numbers_of_rows: range | list[int]) -> None:
    model, input_ids = load_trainer_model(setting), torch.tensor(prompt_of(13, 300))

    def hidden(num_rows: int) -> torch.Tensor:
        segments = [Segment(start_row=0, end_row=num_rows)]
        attention = PackedAttention.from_segments(model.config, segments, model.ops)
        return model(input_ids[:num_rows], torch.arange(num_rows), attention).detach()

    expected = hidden(300).view(torch.int32)
    for num_rows in numbers_of_rows:
        assert torch.equal(hidden(num_rows).view(torch.int32), expected[:num_rows]), f"{num_rows} rows"


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_a_group_that_shares_its_prompt_has_the_trainers_logprobs(setting: Setting, temperature: float) -> None:
    params = SamplingParams(n=5, max_tokens=21, seed=4, temperature=temperature, ignore_eos=True)
    requests = {**random_mates(6, seed=14), "group": (prompt_of(9), params)}
    group = run(make_engine(setting, max_num_batched_tokens=64), requests)["group"]
    model = load_trainer_model(setting)
    shared = group_logprobs(model, prompt_of(9), group, temperature)
    for completion, logprobs in zip(group, shared, strict=True):
        assert float_bits(logprobs) == float_bits(completion.logprobs)
        by_itself = trainer_logprobs(model, prompt_of(9), completion, temperature)
        assert float_bits(by_itself) == float_bits(completion.logprobs)


def test_a_greedy_completion_has_the_trainers_logprobs_at_temperature_1(tiny_setting: Setting) -> None:
    greedy = run_one(make_engine(tiny_setting), prompt_of(9), SamplingParams(max_tokens=24, temperature=0.0))
    trainer = trainer_logprobs(load_trainer_model(tiny_setting), prompt_of(9), greedy, temperature=1.0)
    assert float_bits(trainer) == float_bits(greedy.logprobs)


def test_weights_of_spread_exponents_keep_engine_and_trainer_together(tiny_setting: Setting) -> None:
    weights = spread_weights(tiny_setting)
    engine, model = make_engine(tiny_setting), load_trainer_model(tiny_setting)
    engine.update_weights(weights, 1)
    model.load_weights(weights)
    completion = run_one(engine, prompt_of(9), SamplingParams(max_tokens=40, seed=1, ignore_eos=True))
    trainer = trainer_logprobs(model, prompt_of(9), completion, temperature=1.0)
    assert float_bits(trainer) == float_bits(completion.logprobs)


# Controls: one operation of torch's on the trainer's side, all else as it is, and the comparison fails


def torchs_linear(x, packed, num_outputs, bias, master, is_dot):
    """The sums of the same products as in our Linear, in torch's order."""
    x = x.bfloat16().float() if is_dot else x
    return functional.linear(x, master.to(packed.dtype).float(), bias)


def torchs_attention(q_TNH, k_TKH, v_TKH, plan, scale, window):
    assert window == 0
    group_size = q_TNH.shape[1] // k_TKH.shape[1]
    k_TNH, v_TNH = (x.to(plan.kv_dtype).float().repeat_interleave(group_size, dim=1) for x in (k_TKH, v_TKH))
    q, k, v = (x.transpose(0, 1) for x in (q_TNH, k_TNH, v_TNH))
    return functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(0, 1).contiguous()


def torchs_logprobs(hidden, packed, vocab_size, target_ids, temperature, master, is_dot):
    """torch's log-softmax of our own logits."""
    logits = linear(hidden, packed, vocab_size, None, master, is_dot) / temperature[:, None]
    return logits.log_softmax(dim=-1).gather(1, target_ids[:, None]).squeeze(1)


@pytest.mark.parametrize(
    ("ours", "torchs"),
    [
        ("engine.cpu_ops.linear", torchs_linear),
        ("engine.cpu_ops.CPUOps.packed_attention", torchs_attention),
        ("engine.cpu_ops.token_logprobs", torchs_logprobs),
    ],
    ids=["linear", "attention", "log-softmax"],
)
def test_the_comparison_notices_an_operation_of_torchs_own(
    tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch, ours: str, torchs: Callable[..., torch.Tensor]
) -> None:
    decoded = run_one(make_engine(tiny_setting), prompt_of(9), SamplingParams(max_tokens=60, seed=1, ignore_eos=True))
    model = load_trainer_model(tiny_setting)
    same = trainer_logprobs(model, prompt_of(9), decoded, temperature=1.0)
    assert float_bits(same) == float_bits(decoded.logprobs)
    monkeypatch.setattr(ours, staticmethod(torchs) if "CPUOps" in ours else torchs)
    swapped = trainer_logprobs(model, prompt_of(9), decoded, temperature=1.0)
    assert float_bits(swapped) != float_bits(decoded.logprobs)
    # A key that rounds the other way is off by 2^-8: where keys are bfloat16, the first difference grows.
    tolerance = 1e-4 if tiny_setting.numerics == "float32" else 0.05
    assert torch.allclose(swapped, same, atol=tolerance)


# No fallback: what torch may do to a floating-point tensor between the kernels is to make, cut and move it

MOVES = {
    "_to_copy", "_unsafe_view", "alias", "arange", "as_strided", "cat", "clone", "contiguous", "copy_", "detach",
    "detach_", "empty", "empty_like", "empty_strided", "expand", "fill_", "flatten", "full", "index", "index_select",
    "lift_fresh", "new_empty", "new_empty_strided", "new_zeros", "ones", "permute", "reshape", "resolve_conj",
    "resolve_neg", "select", "slice", "split", "split_with_sizes", "squeeze", "t", "to", "transpose", "unbind",
    "unsqueeze", "view", "zero_", "zeros", "zeros_like",
}  # fmt: skip


class ArithmeticOfTorchs(TorchDispatchMode):
    """Notes every operation of torch's that does arithmetic with floating-point tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.num_operations = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.num_operations += 1
        tensors = [x for x in (*args, result) if isinstance(x, torch.Tensor)]
        if any(x.is_floating_point() for x in tensors):
            self.names.add(func.overloadpacket.__name__)
        self.names -= MOVES
        return result


def test_no_arithmetic_of_torchs_stands_between_the_kernels(tiny_setting: Setting) -> None:
    engine, model = make_engine(tiny_setting, num_blocks=12), load_trainer_model(tiny_setting)
    group = SamplingParams(n=4, max_tokens=40, seed=4, temperature=0.7, ignore_eos=True)
    with ArithmeticOfTorchs() as torchs:
        done = run(engine, {**random_mates(6, seed=15), "group": (prompt_of(9), group)})
        group_logprobs(model, prompt_of(9), done["group"], temperature=0.7)
    assert engine.stats().num_preemptions > 0
    assert torchs.num_operations > 1000
    assert torchs.names == set()


def test_arithmetic_of_torchs_is_noticed(tiny_setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the test above."""
    model = load_trainer_model(tiny_setting)
    decoded = run_one(make_engine(tiny_setting), prompt_of(9))
    for ours, torchs, name in (
        ("engine.cpu_ops.linear", torchs_linear, "mm"),
        ("engine.cpu_ops.token_logprobs", torchs_logprobs, "_log_softmax"),
    ):
        with monkeypatch.context() as patch, ArithmeticOfTorchs() as noticed:
            patch.setattr(ours, torchs)
            trainer_logprobs(model, prompt_of(9), decoded, temperature=0.9)
        assert name in noticed.names


def test_the_library_in_force_is_the_fastest_build_or_the_one_asked_for() -> None:
    name = os.environ.get("LOCKSTEP_ISA") or available_instruction_sets()[0]
    assert library()._name == str(library_path(name))
    assert kernels.instruction_set() == name
