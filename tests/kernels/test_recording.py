"""A recording does again what was done, on what its inputs hold by then, and refuses what it could not repeat."""

from __future__ import annotations

import gc

import pytest
import torch
from kernel_checks import assert_same_bits, pack, spread

from kernels.activation import silu_and_mul
from kernels.attention import kv_store, paged_attention
from kernels.linear import embedding, linear
from kernels.logprobs import vocab_stats
from kernels.profiles import PROFILES, Profile
from kernels.recording import MIN_ROOM_BYTES, RECORDABLE, Arena, record
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.rotary import rotary, rotary_table

WIDTH, HEADS, KV_HEADS, HEAD_DIM, ROWS = 64, 4, 2, 16, 5
every_profile = pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES.keys())


class Layer:
    """A little of everything that a model does with the rows of a decode step."""

    def __init__(self, profile: Profile) -> None:
        dtype, num_qkv = profile.weight_dtype, (HEADS + 2 * KV_HEADS) * HEAD_DIM
        self.is_dot = profile.is_dot
        self.table, self.weight = rotary_table(64, HEAD_DIM, 1e4), spread(WIDTH, seed=1)
        self.qkv, self.out = (
            pack(spread(num_qkv, WIDTH, seed=2).to(dtype)),
            pack(spread(WIDTH, WIDTH, seed=3).to(dtype)),
        )
        self.words = pack(spread(100, WIDTH, seed=4, low=-2, high=1).to(dtype))
        self.ids, self.positions = torch.arange(ROWS) * 7, torch.arange(ROWS)
        self.keys = torch.zeros(ROWS, KV_HEADS, HEAD_DIM, 16, dtype=profile.kv_dtype)
        self.values = torch.zeros(ROWS, KV_HEADS, 16, HEAD_DIM, dtype=profile.kv_dtype)
        self.tables = torch.arange(ROWS, dtype=torch.int32)[:, None]
        self.slots = torch.arange(ROWS) * 16
        self.gate = pack(spread(2 * WIDTH, WIDTH, seed=7).to(dtype))
        self.starts, self.lengths = torch.arange(ROWS + 1).int(), torch.ones(ROWS, dtype=torch.int32)

    def forward(self) -> torch.Tensor:
        x = embedding(self.ids, self.words)
        y = rms_norm(x, self.weight, 1e-5)
        qkv = linear(y, self.qkv, (HEADS + 2 * KV_HEADS) * HEAD_DIM, is_dot=self.is_dot).view(ROWS, -1, HEAD_DIM)
        qk = rotary(qkv[:, : HEADS + KV_HEADS], self.positions, self.table)
        kv_store(qk[:, HEADS:], qkv[:, HEADS + KV_HEADS :], self.keys, self.values, self.slots)
        attended = paged_attention(
            qk[:, :HEADS], self.keys, self.values, self.tables, self.starts, self.lengths, HEAD_DIM**-0.5
        )
        delta = linear(attended.view(ROWS, -1), self.out, WIDTH, is_dot=self.is_dot)
        _, normed = add_rms_norm(x, delta, self.weight, 1e-5)
        return silu_and_mul(linear(normed, self.gate, 2 * WIDTH, is_dot=self.is_dot))


@torch.inference_mode()
def test_every_recordable_kernel_is_repeated_with_its_bits() -> None:
    calls = []
    for profile in PROFILES.values():
        layer = Layer(profile)
        expected = layer.forward().clone()
        recording = record(layer.forward, Arena())
        assert_same_bits(recording.output, expected)
        recording.output.zero_()
        assert_same_bits(recording.run(), expected)
        calls += [name for name, _ in recording.calls]
    assert set(calls) == set(RECORDABLE)


@every_profile
@torch.inference_mode()
def test_inputs_and_weights_are_read_where_they_are_when_it_runs(profile: Profile) -> None:
    layer = Layer(profile)
    recording = record(layer.forward, Arena())
    before = recording.output.clone()
    layer.ids.add_(1)
    layer.weight.mul_(1.5)
    expected = layer.forward().clone()
    assert_same_bits(recording.run(), expected)
    assert not torch.equal(before, expected)


@torch.inference_mode()
def test_recordings_of_one_arena_take_turns() -> None:
    arena, layers = Arena(), [Layer(profile) for profile in PROFILES.values()]
    recordings = [record(layer.forward, arena) for layer in layers]
    for _ in range(3):
        for layer, recording in zip(layers, recordings):
            assert_same_bits(recording.run(), layer.forward())


@torch.inference_mode()
def test_what_torch_computes_is_refused_by_name() -> None:
    x, weight, narrow = spread(3, WIDTH, seed=5), torch.ones(WIDTH), torch.ones(3)
    head, temperature = pack(torch.ones(70, WIDTH)), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"cannot repeat aten\.mul"):
        record(lambda: rms_norm(x * 2, weight, 1e-5), Arena())
    with pytest.raises(RuntimeError, match=r"cannot repeat aten\.(clone|contiguous)"):
        record(lambda: rms_norm(x.T.contiguous(), narrow, 1e-5), Arena())
    with pytest.raises(RuntimeError, match="cannot repeat ls_vocab_stats: only"):
        record(lambda: vocab_stats(x, head, 70, temperature)[0], Arena())


@torch.inference_mode()
def test_calls_are_noted_only_while_recording() -> None:
    x, weight = spread(3, WIDTH, seed=6), torch.ones(WIDTH)
    recording = record(lambda: rms_norm(x, weight, 1e-5), Arena())
    rms_norm(x, weight, 1e-5)
    assert [name for name, _ in recording.calls] == ["ls_rms_norm"]
    assert recording.only("ls_linear").calls == []


def test_memory_that_is_let_go_of_serves_the_next_tensor() -> None:
    arena = Arena()
    first = arena.empty((3, 5), torch.float32)
    address, view = first.data_ptr(), first[1:]
    del first
    gc.collect()
    assert arena.empty((3, 5), torch.float32).data_ptr() != address  # a view still holds it
    del view
    gc.collect()
    again = arena.empty((MIN_ROOM_BYTES // 2,), torch.bfloat16)
    assert again.data_ptr() == address
    assert arena.empty((0, 7), torch.float32).shape == (0, 7)
