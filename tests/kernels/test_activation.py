from __future__ import annotations

import pytest
import torch
from kernel_checks import assert_close, assert_rows_do_not_depend_on_their_number, assert_same_bits, spread

from kernels import reference
from kernels.activation import silu_and_mul
from kernels.library import set_num_threads


@pytest.mark.parametrize("width", [1, 15, 16, 72, 200])
def test_every_number_of_rows_equals_the_reference(width):
    x = spread(130, 2 * width, seed=1)
    assert_rows_do_not_depend_on_their_number(silu_and_mul, x, reference.silu_and_mul(x))


def test_a_wide_range_equals_the_reference():
    gate = torch.cat([torch.linspace(-200, 200, 40_001), torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, 87.33])])
    x = torch.cat([gate, spread(len(gate), seed=2)])[None]
    assert_same_bits(silu_and_mul(x), reference.silu_and_mul(x))


def test_torch_silu_would_not_pass():
    """torch rounds the elements of a vector's tail otherwise than those of its body."""
    x = spread(33, 144, seed=3)
    expected = reference.silu_and_mul(x)
    with pytest.raises(AssertionError, match="differ in bits"):
        assert_rows_do_not_depend_on_their_number(
            lambda rows: torch.nn.functional.silu(rows[:, :72]) * rows[:, 72:], x, expected
        )


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
def test_threads_and_place_do_not_show(num_threads):
    x = spread(101, 400, seed=4)
    set_num_threads(1)
    y = silu_and_mul(x)
    set_num_threads(num_threads)
    assert_same_bits(silu_and_mul(x), y)
    assert_same_bits(silu_and_mul(x[7:]), y[7:])
    assert_same_bits(silu_and_mul(x.flip(0)), y.flip(0))
    assert_same_bits(silu_and_mul(x.T.contiguous().T), y)


def test_gradient_is_that_of_the_formula():
    x, grad = spread(50, 144, seed=5), spread(50, 72, seed=6)
    exact_x = x.double().requires_grad_()
    (torch.nn.functional.silu(exact_x[:, :72]) * exact_x[:, 72:]).backward(grad.double())
    gradients = []
    for num_threads in (1, 3):
        set_num_threads(num_threads)
        leaf = x.clone().requires_grad_()
        y = silu_and_mul(leaf)
        assert_same_bits(y.detach(), silu_and_mul(x))
        y.backward(grad)
        gradients.append(leaf.grad)
    assert_close(gradients[0], exact_x.grad, 1e-6)
    assert_same_bits(*gradients)


def test_another_dtype_is_refused():
    with pytest.raises(ValueError, match="float64"):
        silu_and_mul(torch.ones(2, 32).double())
