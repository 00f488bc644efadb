from __future__ import annotations

import pytest
import torch
from gpu_checks import TOLERANCE, assert_near, on_device, rounded_spread
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.gpu.linear import embedding, linear


def operands(num_rows: int, num_outputs: int, width: int, dtype: torch.dtype):
    x = rounded_spread(num_rows, width, seed=1, dtype=dtype)
    weight = rounded_spread(num_outputs, width, seed=2, dtype=dtype)
    return x, weight, rounded_spread(num_outputs, seed=3, dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_rows", "num_outputs", "width"), [(1, 16, 64), (5, 70, 72), (65, 130, 200), (300, 40, 64)]
)
def test_products_are_near_the_reference(num_rows, num_outputs, width, dtype):
    x, weight, bias = operands(num_rows, num_outputs, width, dtype)
    exact = reference.linear(x, weight, bias)
    x, weight, bias = on_device(x, dtype), on_device(weight, dtype), on_device(bias)
    assert_near(linear(x, weight, bias, out_dtype=torch.float32), exact, 5e-6)
    assert_near(linear(x, weight, bias).float(), exact, TOLERANCE[dtype])
    assert linear(x, weight).dtype is dtype


def test_a_view_at_any_address_gives_the_same_bits():
    x, weight, _ = operands(5, 20, 72, torch.bfloat16)
    x, weight = on_device(x, torch.bfloat16), on_device(weight, torch.bfloat16)
    shifted = torch.cat([x.new_zeros(3), x.flatten()])[3:].view(x.shape)
    wide = torch.cat([x, x], dim=1)[:, :72]
    for view in (shifted, wide):
        assert_same_bits(linear(view, weight), linear(x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_product(dtype):
    x, weight, bias = operands(9, 24, 40, dtype)
    slopes = rounded_spread(9, 24, seed=4, dtype=dtype)
    leaf, master, offset = (on_device(t).requires_grad_() for t in (x.to(dtype), weight.clone(), bias))
    y = linear(leaf, on_device(weight, dtype), offset, torch.float32, master)
    (y * on_device(slopes)).sum().backward()
    assert leaf.grad.dtype is dtype
    assert_near(leaf.grad.float(), slopes @ weight, TOLERANCE[dtype])
    assert_near(master.grad, slopes.T @ x, 5e-6)
    assert_near(offset.grad, slopes.sum(0), 5e-6)


def test_embedding_copies_rows_and_adds_up_their_gradients():
    ids, weight = torch.tensor([3, 1, 3, 0]), torch.randn(5, 16).bfloat16()
    master = on_device(weight.float()).requires_grad_()
    out = embedding(on_device(ids), on_device(weight), master)
    assert_same_bits(out.detach().cpu(), weight.float()[ids])
    out.sum().backward()
    assert master.grad[:, 0].tolist() == [1, 1, 0, 2, 0]


@pytest.mark.parametrize(
    ("x_dtype", "weight_dtype", "width"),
    [(torch.float32, torch.bfloat16, 8), (torch.float16, torch.float16, 8), (torch.float32, torch.float32, 9)],
)
def test_operands_that_do_not_fit_are_refused(x_dtype, weight_dtype, width):
    with pytest.raises(ValueError, match=r"both must be|columns"):
        linear(torch.zeros(2, 8, dtype=x_dtype), torch.zeros(4, width, dtype=weight_dtype))
