from __future__ import annotations

import pytest
import torch
from kernel_checks import (
    assert_close,
    assert_rows_do_not_depend_on_their_number,
    assert_same_bits,
    num_different,
    spread,
)

from kernels import reference
from kernels.library import set_num_threads
from kernels.rms_norm import add_rms_norm, head_norms, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("width", [1, 5, 16, 17, 64, 72, 576, 9001])
def test_every_number_of_rows_equals_the_reference(width):
    x, weight = spread(130 if width < 600 else 9, width, seed=1), spread(width, seed=2)
    expected = reference.rms_norm(x, weight, EPS)
    assert_rows_do_not_depend_on_their_number(lambda rows: rms_norm(rows, weight, EPS), x, expected)


@pytest.mark.parametrize("width", [64, 77])
def test_the_residual_sum_is_rounded_first(width):
    x, delta, weight = spread(21, width, seed=3), spread(21, width, seed=4), spread(width, seed=5)
    total, y = add_rms_norm(x, delta, weight, EPS)
    expected_total, expected = reference.add_rms_norm(x, delta, weight, EPS)
    assert_same_bits(total, expected_total)
    assert_same_bits(y, expected)
    assert_same_bits(y, rms_norm(total, weight, EPS))


def test_another_order_of_summation_shows_in_the_bits():
    x, weight = spread(50, 576, seed=6), spread(576, seed=7)
    backwards = rms_norm(x.flip(1), weight.flip(0), EPS).flip(1)
    assert num_different(rms_norm(x, weight, EPS), backwards) > x.numel() // 10


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_threads_do_not_show(num_threads):
    x, delta, weight = spread(200, 576, seed=8), spread(200, 576, seed=9), spread(576, seed=10)
    set_num_threads(1)
    expected = add_rms_norm(x, delta, weight, EPS)
    set_num_threads(num_threads)
    for actual, one in zip(add_rms_norm(x, delta, weight, EPS), expected):
        assert_same_bits(actual, one)


def test_place_and_strides_do_not_show():
    x, delta, weight = spread(40, 72, seed=11), spread(40, 72, seed=12), spread(72, seed=13)
    total, y = add_rms_norm(x, delta, weight, EPS)
    wide = torch.full((40, 91), float("nan"))
    wide[:, 7:79] = x
    wide_delta = torch.full((40, 91), float("nan"))
    wide_delta[:, 7:79] = delta
    for actual, expected in zip(add_rms_norm(wide[:, 7:79], wide_delta[:, 7:79], weight, EPS), (total, y)):
        assert_same_bits(actual, expected)
    order = torch.randperm(40, generator=torch.Generator().manual_seed(14))
    assert_same_bits(add_rms_norm(x[order], delta[order], weight, EPS)[1], y[order])
    assert_same_bits(add_rms_norm(x[11:], delta[11:], weight, EPS)[1], y[11:])


def test_zeros_and_extremes_follow_ieee():
    x = torch.zeros(5, 72)
    x[1], x[2] = -0.0, 1e-22
    x[3], x[4, 5] = 1e18, 3e18
    weight = spread(72, seed=15)
    assert_same_bits(rms_norm(x, weight, EPS), reference.rms_norm(x, weight, EPS))


def _exact(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight


def test_gradients_are_those_of_the_formula():
    x, weight, grad = spread(33, 72, seed=16), spread(72, seed=17), spread(33, 72, seed=18)
    exact_inputs = [t.double().requires_grad_() for t in (x, weight)]
    _exact(*exact_inputs).backward(grad.double())
    inputs = [t.clone().requires_grad_() for t in (x, weight)]
    y = rms_norm(*inputs, EPS)
    assert_same_bits(y.detach(), rms_norm(x, weight, EPS))
    y.backward(grad)
    for actual, exact in zip(inputs, exact_inputs):
        assert_close(actual.grad, exact.grad, 2e-6)


def test_gradients_of_the_fused_form_reach_both_terms():
    x, delta, weight = spread(33, 72, seed=19), spread(33, 72, seed=20), spread(72, seed=21)
    grad_total, grad = spread(33, 72, seed=22), spread(33, 72, seed=23)
    exact_inputs = [t.double().requires_grad_() for t in (x, delta, weight)]
    total = exact_inputs[0] + exact_inputs[1]
    torch.autograd.backward([total, _exact(total, exact_inputs[2])], [grad_total.double(), grad.double()])
    inputs = [t.clone().requires_grad_() for t in (x, delta, weight)]
    torch.autograd.backward(add_rms_norm(*inputs, EPS), [grad_total, grad])
    for actual, exact in zip(inputs, exact_inputs):
        assert_close(actual.grad, exact.grad, 2e-6)


def make_heads(num_rows: int):
    """(heads [T, 5, 32] strided over rows, as they lie in the output of q, k and v, and the two weights)."""
    wide = spread(num_rows, 7 * 32, seed=24)
    return wide.view(num_rows, 7, 32)[:, :5], spread(32, seed=25), spread(32, seed=26)


def test_each_head_is_normed_by_itself():
    qk, q_weight, k_weight = make_heads(33)
    y = head_norms(qk, q_weight, k_weight, 3, EPS)
    for head in range(5):
        expected = rms_norm(qk[:, head].contiguous(), q_weight if head < 3 else k_weight, EPS)
        assert_same_bits(y[:, head], expected)
    assert_same_bits(head_norms(qk[7:8], q_weight, k_weight, 3, EPS), y[7:8])


@pytest.mark.parametrize("num_rows", [1, 33, 70])
def test_gradients_of_heads_are_those_of_the_formula(num_rows):
    inputs, grad = make_heads(num_rows), spread(num_rows, 5, 32, seed=27)
    exact = [t.double().requires_grad_() for t in inputs]
    torch.cat([_exact(exact[0][:, :3], exact[1]), _exact(exact[0][:, 3:], exact[2])], 1).backward(grad.double())

    def gradients():
        leaves = [t.clone().requires_grad_() for t in inputs]
        head_norms(*leaves, 3, EPS).backward(grad)
        return [t.grad for t in leaves]

    first = gradients()
    for actual, wanted in zip(first, exact):
        assert_close(actual, wanted.grad, 2e-6)
    set_num_threads(3)
    for once, again in zip(first, gradients()):
        assert_same_bits(once, again)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="float64"):
        rms_norm(torch.ones(2, 16).double(), torch.ones(16), EPS)
    with pytest.raises(ValueError, match="delta is"):
        add_rms_norm(torch.ones(2, 16), torch.ones(2, 16).bfloat16(), torch.ones(16), EPS)
