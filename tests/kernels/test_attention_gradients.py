from __future__ import annotations

import pytest
import torch
from kernel_checks import SEGMENTS, assert_close, assert_same_bits, make_sequence, packed_rows, spread

from kernels import reference
from kernels.attention import PackedPlan, packed_attention
from kernels.library import set_num_threads

SCALE = 0.25


def _exact_attention(q, k, v, segments, window):
    """Float64 softmax attention over segments, by torch."""
    group, outputs = q.shape[1] // k.shape[1], []
    for first, end, parent in segments:
        prompt = range(*segments[parent][:2]) if parent >= 0 else range(0)
        rows = torch.tensor([*prompt, *range(first, end)], dtype=torch.int64)
        keys, values = k[rows].repeat_interleave(group, 1), v[rows].repeat_interleave(group, 1)
        scores = torch.einsum("rnh,jnh->nrj", q[first:end], keys) * SCALE
        position, key = torch.arange(len(prompt), len(rows))[:, None], torch.arange(len(rows))
        is_hidden = (key > position) | (key <= position - window if window else torch.zeros(()).bool())
        outputs.append(torch.einsum("nrj,jnh->rnh", scores.masked_fill(is_hidden, -torch.inf).softmax(2), values))
    return torch.cat(outputs)


# a prompt of several key tiles with samples, and a sequence of its own: their keys are dealt out to 4 and 2 shares
LONG_SEGMENTS = [(0, 700, -1), (700, 710, 0), (710, 1100, 0), (1100, 1700, -1)]


@pytest.mark.parametrize(
    ("segments", "num_heads", "num_kv_heads", "head_dim", "window"),
    [
        (SEGMENTS, 4, 2, 16, 0),
        (SEGMENTS, 3, 1, 80, 0),
        (SEGMENTS, 2, 2, 32, 9),
        (SEGMENTS, 5, 1, 144, 0),
        (LONG_SEGMENTS, 3, 1, 16, 0),
        (LONG_SEGMENTS, 2, 2, 16, 70),
        (LONG_SEGMENTS, 1, 1, 16, 500),
    ],
)
def test_gradients_are_those_of_softmax_attention(segments, num_heads, num_kv_heads, head_dim, window):
    num_rows = segments[-1][1]
    s = make_sequence(num_rows, num_heads, num_kv_heads, head_dim, seed=40)
    grad = spread(num_rows, num_heads, head_dim, seed=50)
    exact_inputs = [t.double().requires_grad_() for t in (s.q, s.k, s.v)]
    _exact_attention(*exact_inputs, segments, window).backward(grad.double())
    runs = []
    for num_threads in (1, 2, 5):
        set_num_threads(num_threads)
        inputs = [t.clone().requires_grad_() for t in (s.q, s.k, s.v)]
        out = packed_attention(*inputs, PackedPlan(segments), SCALE, window)
        assert_same_bits(out.detach(), packed_attention(s.q, s.k, s.v, PackedPlan(segments), SCALE, window))
        out.backward(grad)
        runs.append([t.grad for t in inputs])
    for once, twice, again, exact in zip(*runs, exact_inputs):
        assert_close(once, exact.grad, 1e-5)
        assert_same_bits(once, twice)
        assert_same_bits(once, again)


def test_gradients_pass_straight_through_the_rounding_of_keys_and_values():
    s, grad = packed_rows(), spread(160, 4, 16, seed=53)
    rounded = [s.q, *(reference.round_kv(t, torch.bfloat16) for t in (s.k, s.v))]
    grads = []
    for tensors, kv_dtype in (((s.q, s.k, s.v), torch.bfloat16), (rounded, torch.float32)):
        inputs = [t.clone().requires_grad_() for t in tensors]
        packed_attention(*inputs, PackedPlan(SEGMENTS, kv_dtype=kv_dtype), SCALE).backward(grad)
        grads.append([t.grad for t in inputs])
    for one, other in zip(*grads):
        assert_same_bits(one, other)


def test_gradients_of_odd_layouts_are_the_same():
    s = packed_rows()
    grads = []
    for change in (lambda t: t, lambda t: t.transpose(0, 1).contiguous().transpose(0, 1)):
        inputs = [t.clone().requires_grad_() for t in (s.q, s.k, s.v)]
        packed_attention(*map(change, inputs), PackedPlan(SEGMENTS), SCALE).backward(spread(160, 4, 16, seed=51))
        grads.append([t.grad for t in inputs])
    for one, other in zip(*grads):
        assert_same_bits(one, other)


def test_gradients_do_not_depend_on_other_groups():
    s, grad = packed_rows(), spread(160, 4, 16, seed=52)
    whole = [t.clone().requires_grad_() for t in (s.q, s.k, s.v)]
    packed_attention(*whole, PackedPlan(SEGMENTS), SCALE).backward(grad)
    group = [t[:90].clone().requires_grad_() for t in (s.q, s.k, s.v)]
    packed_attention(*group, PackedPlan(SEGMENTS[:4]), SCALE).backward(grad[:90])
    for one, other in zip(whole, group):
        assert_same_bits(one.grad[:90], other.grad)


def test_gradients_of_a_short_group_do_not_depend_on_a_long_one():
    s, grad = make_sequence(740, 2, 1, 16, seed=41), spread(740, 2, 16, seed=54)
    whole = [t.clone().requires_grad_() for t in (s.q, s.k, s.v)]
    packed_attention(*whole, PackedPlan([(0, 40, -1), (40, 740, -1)]), SCALE).backward(grad)
    alone = [t[:40].clone().requires_grad_() for t in (s.q, s.k, s.v)]
    packed_attention(*alone, PackedPlan([(0, 40, -1)]), SCALE).backward(grad[:40])
    for one, other in zip(whole, alone):
        assert_same_bits(one.grad[:40], other.grad)
