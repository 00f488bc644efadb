"""What only a device can show: that bits do not depend on the batch. Run with `-m gpu` where there is one."""

from __future__ import annotations

import functools

import pytest
import torch
from kernel_checks import (
    assert_rows_do_not_depend_on_their_number,
    assert_same_bits,
    num_different,
    spread,
)

from kernels.gpu.activation import silu_and_mul
from kernels.gpu.attention import kv_store, paged_attention, split_attention, whole_attention
from kernels.gpu.linear import linear
from kernels.gpu.logprobs import sample, token_logprobs, vocab_stats
from kernels.gpu.packed_attention import packed_attention
from kernels.gpu.packed_plan import PackedPlan
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.rotary import norm_and_rotary

pytestmark = pytest.mark.gpu

BFLOAT16 = torch.bfloat16
NUM_ROWS = 300
SCALE = 128**-0.5


def cuda_spread(*shape: int, seed: int, dtype: torch.dtype = BFLOAT16, low: int = -4, high: int = 4) -> torch.Tensor:
    return spread(*shape, seed=seed, low=low, high=high).to(device="cuda", dtype=dtype)


@pytest.mark.parametrize(
    ("num_outputs", "width", "dtype"),
    [
        (1152, 576, BFLOAT16), (576, 1536, BFLOAT16), (6144, 4096, BFLOAT16), (4096, 12288, BFLOAT16),
        (28672, 1024, BFLOAT16), (72, 200, BFLOAT16), (130, 72, torch.float32),
    ],
)  # fmt: skip
def test_every_number_of_rows_gives_the_same_products(num_outputs, width, dtype):
    """Crosses the border between narrow and wide tiles, which must not show."""
    x, weight = cuda_spread(NUM_ROWS, width, seed=1, dtype=dtype), cuda_spread(num_outputs, width, seed=2, dtype=dtype)
    bias = cuda_spread(num_outputs, seed=3, dtype=torch.float32)
    run = functools.partial(linear, weight_NK=weight, bias=bias, out_dtype=torch.float32)
    expected = run(x)
    assert_rows_do_not_depend_on_their_number(run, x, expected)
    for first in (1, 63, 64, 65, 200):
        assert_same_bits(run(x[first:]), expected[first:])
    assert num_different(run(x.flip(1).contiguous()), expected) > 0  # another order of k would show


def test_products_are_near_exact_ones():
    x, weight = cuda_spread(200, 4096, seed=1), cuda_spread(512, 4096, seed=2)
    exact = x.double() @ weight.double().T
    scale = (x.double().abs() @ weight.double().abs().T).max()
    assert ((linear(x, weight, out_dtype=torch.float32).double() - exact).abs().max() / scale).item() < 1e-5


@pytest.mark.parametrize("width", [77, 576, 4096])
def test_every_number_of_rows_gives_the_same_norms(width):
    x, delta = (cuda_spread(NUM_ROWS, width, seed=seed, dtype=torch.float32) for seed in (1, 2))
    weight = cuda_spread(width, seed=3, dtype=torch.float32)
    expected = add_rms_norm(x, delta, weight, 1e-5)
    for num_rows in range(1, NUM_ROWS + 1):
        for actual, one in zip(add_rms_norm(x[:num_rows], delta[:num_rows], weight, 1e-5), expected):
            assert_same_bits(actual, one[:num_rows])
    assert_same_bits(add_rms_norm(x[7:], delta[7:], weight, 1e-5)[1], expected[1][7:])


def test_every_number_of_rows_gives_the_same_turned_heads_and_activations():
    qkv, table = cuda_spread(NUM_ROWS, 48, 128, seed=1), cuda_spread(512, 128, seed=2, dtype=torch.float32)
    positions = torch.arange(NUM_ROWS, device="cuda")
    weights = [cuda_spread(128, seed=seed, dtype=torch.float32) for seed in (3, 4)]
    turned, activated = norm_and_rotary(qkv[:, :40], positions, table, *weights, 32, 1e-6), silu_and_mul(qkv.flatten(1))
    for num_rows in range(1, NUM_ROWS + 1):
        rows = qkv[:num_rows]
        again = norm_and_rotary(rows[:, :40], positions[:num_rows], table, *weights, 32, 1e-6)
        assert_same_bits(again, turned[:num_rows])
        assert_same_bits(silu_and_mul(rows.flatten(1)), activated[:num_rows])


LENGTH = 1100


@functools.cache
def sequence(num_heads: int, num_kv_heads: int, head_dim: int):
    """(q, k, v) of one sequence on the device."""
    q = cuda_spread(LENGTH, num_heads, head_dim, seed=1, low=-2, high=2)
    k, v = (cuda_spread(LENGTH, num_kv_heads, head_dim, seed=seed, low=-2, high=2) for seed in (2, 3))
    return q, k, v


def stored(k, v, block_size: int, seed: int):
    """(keys, values, table) with the blocks in random order and NaN wherever nothing is stored."""
    count = -(-LENGTH // block_size)
    table = torch.randperm(count + 3, generator=torch.Generator().manual_seed(seed))[:count].cuda()
    keys = torch.full((count + 3, k.shape[1], block_size, k.shape[2]), float("nan"), device="cuda", dtype=k.dtype)
    values = keys.clone()
    positions = torch.arange(LENGTH, device="cuda")
    kv_store(k, v, keys, values, table[positions // block_size] * block_size + positions % block_size)
    return keys, values, table.int()


def attend(q, blocks, rows, window, run=paged_attention):
    """Rows (first, end) of the sequence, each an entry of its own, in one call."""
    keys, values, table = blocks
    starts = torch.tensor([0, *(end - first for first, end in rows)], device="cuda").cumsum(0).int()
    lengths = torch.tensor([end for _, end in rows], device="cuda").int()
    tables = table.expand(len(rows), -1).contiguous()
    out = run(torch.cat([q[first:end] for first, end in rows]), keys, values, tables, starts, lengths, SCALE, window)
    return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("window", [0, 300])
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(9, 3, 64), (32, 8, 128), (14, 2, 64), (4, 4, 80)])
def test_decode_chunks_splits_and_blocks_equal_prefill(num_heads, num_kv_heads, head_dim, window):
    q, k, v = sequence(num_heads, num_kv_heads, head_dim)
    blocks = stored(k, v, 16, seed=1)
    prefill = attend(q, blocks, [(0, LENGTH)], window, run=whole_attention)
    assert prefill.isfinite().all()
    for run in (whole_attention, split_attention, paged_attention):
        for first in range(0, LENGTH, 100):  # decode of a hundred positions at once, each a sequence of its own
            rows = [(at, at + 1) for at in range(first, first + 100)]
            assert_same_bits(attend(q, blocks, rows, window, run), prefill[first : first + 100])
        assert_same_bits(attend(q, blocks, [(0, LENGTH)], window, run), prefill)
    for cut in (1, 15, 64, 255, 256, 257, 700):
        parts = [attend(q, blocks, [rows], window) for rows in ((0, cut), (cut, LENGTH))]
        assert_same_bits(torch.cat(parts), prefill)
    mixed = attend(q, blocks, [(1099, 1100), (200, 500), (3, 4), (0, 200), (899, 900)], window)
    assert_same_bits(
        mixed, torch.cat([prefill[a:b] for a, b in ((1099, 1100), (200, 500), (3, 4), (0, 200), (899, 900))])
    )
    for block_size in (32, 48, 128):
        assert_same_bits(attend(q, stored(k, v, block_size, seed=2), [(0, LENGTH)], window), prefill)


def test_a_packed_batch_equals_prefill():
    q, k, v = sequence(32, 8, 128)
    prefill = attend(q, stored(k, v, 16, seed=1), [(0, LENGTH)], 0)
    child = slice(400, 900)
    rows = [torch.cat([x[:400], x[child], x[child]]) for x in (q, k, v)]
    plan = PackedPlan([(0, 400, -1), (400, 900, 0), (900, 1400, 0)], "cuda")
    out = packed_attention(*rows, plan, SCALE)
    assert_same_bits(out, torch.cat([prefill[:400], prefill[child], prefill[child]]))


def test_gradients_of_a_packed_batch_repeat():
    q, k, v = (x.clone().requires_grad_() for x in sequence(32, 8, 128))
    plan = PackedPlan([(0, 400, -1), (400, 900, 0), (900, 1100, 0)], "cuda")
    gradients = []
    for _ in range(2):
        out = packed_attention(q, k, v, plan, SCALE)
        gradients.append(torch.autograd.grad(out.float().square().sum(), (q, k, v)))
    for one, again in zip(*gradients):
        assert_same_bits(one, again)


VOCAB, WIDTH = 5000, 1024


def head_operands(num_rows: int):
    hidden = cuda_spread(num_rows, WIDTH, seed=1, low=-2, high=2)
    weight = cuda_spread(VOCAB, WIDTH, seed=2, low=-6, high=-2)
    return hidden, weight, torch.linspace(0.5, 2, num_rows, device="cuda")


def draw_entries(num_draws: int):
    number = torch.arange(num_draws, device="cuda")
    return [number, number << 40, number * 3, number // 20, (number % 7 == 0).to(torch.uint8)]


def test_every_number_of_rows_gives_the_same_sums_and_logprobs():
    hidden, weight, temperature = head_operands(NUM_ROWS)
    targets = torch.arange(NUM_ROWS, device="cuda") * 37 % VOCAB
    stats, logprobs = vocab_stats(hidden, weight, temperature), token_logprobs(hidden, weight, targets, temperature)
    for n in range(1, NUM_ROWS + 1):
        for actual, one in zip(vocab_stats(hidden[:n], weight, temperature[:n]), stats):
            assert_same_bits(actual, one[:n])
        assert_same_bits(token_logprobs(hidden[:n], weight, targets[:n], temperature[:n]), logprobs[:n])


def test_draws_do_not_depend_on_the_batch_and_the_trainer_agrees():
    hidden, weight, temperature = head_operands(NUM_ROWS)
    entries = draw_entries(NUM_ROWS)
    token_ids, logprobs = sample(hidden, weight, temperature, *entries)
    assert len(token_ids.unique()) > NUM_ROWS // 4
    assert_same_bits(token_logprobs(hidden, weight, token_ids, temperature), logprobs)
    for draw in (0, 1, 63, 64, 150, 299):
        row, *rest = (x[draw : draw + 1] for x in entries)
        alone = sample(hidden[row], weight, temperature[row], row * 0, *rest)
        assert_same_bits(alone[0], token_ids[draw : draw + 1])
        assert_same_bits(alone[1], logprobs[draw : draw + 1])


def test_logprobs_are_near_log_softmax():
    hidden, weight, temperature = head_operands(64)
    targets = torch.arange(64, device="cuda") * 37 % VOCAB
    exact = torch.log_softmax((hidden.double() @ weight.double().T) / temperature[:, None], 1)
    difference = token_logprobs(hidden, weight, targets, temperature).double() - exact.gather(1, targets[:, None])[:, 0]
    assert difference.abs().max().item() < 1e-4


def test_a_decode_step_can_be_captured_in_a_graph():
    q, k, v = sequence(32, 8, 128)
    keys, values, table = stored(k, v, 16, seed=1)
    tables, starts = table.expand(4, -1).contiguous(), torch.arange(5, device="cuda").int()
    lengths, rows = torch.tensor([1100, 7, 300, 900], device="cuda").int(), q[[1099, 6, 299, 899]]
    hidden, weight, temperature = head_operands(4)
    entries = draw_entries(4)

    def step():
        out = paged_attention(rows, keys, values, tables, starts, lengths, SCALE)
        return out, *sample(hidden, weight, temperature, *entries)

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    graph.replay()
    for actual, one in zip(captured, expected):
        assert_same_bits(actual, one)
