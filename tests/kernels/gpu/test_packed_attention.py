from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE, assert_near, on_device, rounded_spread
from kernel_checks import assert_same_bits

from kernels import attention as cpu_attention
from kernels import reference
from kernels.gpu.packed_attention import packed_attention
from kernels.gpu.packed_plan import PackedPlan

SCALE = 0.25
SEGMENTS = [(0, 20, -1), (20, 90, 0), (90, 93, 0), (93, 100, -1), (100, 120, -1), (120, 125, 4)]
NUM_ROWS = 125


def operands(num_rows: int, num_heads: int = 2, num_kv_heads: int = 1, head_dim: int = 16):
    return (
        rounded_spread(num_rows, num_heads, head_dim, seed=1, dtype=torch.float32, low=-2, high=2),
        rounded_spread(num_rows, num_kv_heads, head_dim, seed=2, dtype=torch.float32, low=-2, high=2),
        rounded_spread(num_rows, num_kv_heads, head_dim, seed=3, dtype=torch.float32),
    )


def dense_attention(q, k, v, segments, window):
    """Float64 attention of a packed batch, by one mask over all pairs of rows."""
    num_rows = q.shape[0]
    parents = torch.full((num_rows,), -1)
    positions = torch.zeros(num_rows, dtype=torch.int64)
    of_row = torch.zeros(num_rows, dtype=torch.int64)
    for index, (first, end, parent) in enumerate(segments):
        offset = segments[parent][1] - segments[parent][0] if parent >= 0 else 0
        parents[first:end], of_row[first:end] = parent, index
        positions[first:end] = torch.arange(end - first) + offset
    is_seen = (of_row[:, None] == of_row) | (parents[:, None] == of_row)
    distance = positions[:, None] - positions
    is_seen &= (distance >= 0) & ((distance < window) if window else torch.tensor(True))
    group = q.shape[1] // k.shape[1]
    scores = torch.einsum("tnh,jnh->ntj", q, k.repeat_interleave(group, 1)) * SCALE
    weights = scores.masked_fill(~is_seen, float("-inf")).softmax(-1)
    return torch.einsum("ntj,jnh->tnh", weights, v.repeat_interleave(group, 1))


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 30])
def test_forward_is_near_the_reference_whatever_the_block_size(window):
    q, k, v = operands(NUM_ROWS)
    exact = reference.packed_attention(q, k, v, cpu_attention.PackedPlan(SEGMENTS), SCALE, window)
    on_gpu = [on_device(x) for x in (q, k, v)]
    out = packed_attention(*on_gpu, PackedPlan(SEGMENTS, DEVICE), SCALE, window)
    assert_near(out, exact, 5e-6)
    assert_same_bits(packed_attention(*on_gpu, PackedPlan(SEGMENTS, DEVICE, block_size=64), SCALE, window), out)


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 30])
def test_gradients_are_those_of_dense_attention(window):
    leaves = [x.double().requires_grad_() for x in operands(NUM_ROWS)]
    slopes = rounded_spread(NUM_ROWS, 2, 16, seed=4, dtype=torch.float32)
    (dense_attention(*leaves, SEGMENTS, window) * slopes).sum().backward()
    on_gpu = [on_device(x).requires_grad_() for x in operands(NUM_ROWS)]
    out = packed_attention(*on_gpu, PackedPlan(SEGMENTS, DEVICE), SCALE, window)
    (out * on_device(slopes)).sum().backward()
    for actual, exact in zip(on_gpu, leaves):
        assert_near(actual.grad, exact.grad, 2e-5)


def test_bfloat16_gradients_are_near():
    segments = [(0, 20, -1), (20, 70, 0)]
    leaves = [x[:70].bfloat16().double().requires_grad_() for x in operands(70)]
    dense_attention(*leaves, segments, 0).sum().backward()
    on_gpu = [on_device(x, torch.bfloat16).requires_grad_() for x in operands(70)]
    packed_attention(*on_gpu, PackedPlan(segments, DEVICE), SCALE).float().sum().backward()
    for actual, exact in zip(on_gpu, leaves):
        assert_near(actual.grad.float(), exact.grad, 3e-2)


def test_segments_are_checked():
    with pytest.raises(ValueError, match="must begin at row"):
        PackedPlan([(0, 3, -1), (4, 5, -1)], DEVICE)
