from __future__ import annotations

import pytest
import torch
from gpu_checks import assert_near, on_device, rounded_spread

from kernels import reference
from kernels.gpu.activation import silu_and_mul


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize("width", [100, 1100])
def test_values_are_near_the_reference(width, dtype, tolerance):
    x = rounded_spread(4, 2 * width, seed=1, dtype=dtype, high=7)
    y = silu_and_mul(on_device(x, dtype))
    assert y.dtype is dtype
    assert_near(y.float(), reference.silu_and_mul(x), tolerance)


def test_gradients_are_those_of_the_formula():
    x, slopes = rounded_spread(4, 80, seed=2, dtype=torch.float32), torch.randn(4, 40)
    leaf = x.double().requires_grad_()
    gate, up = leaf.chunk(2, dim=1)
    (torch.nn.functional.silu(gate) * up * slopes).sum().backward()
    on_gpu = on_device(x).requires_grad_()
    (silu_and_mul(on_gpu) * on_device(slopes)).sum().backward()
    assert_near(on_gpu.grad, leaf.grad, 2e-6)
