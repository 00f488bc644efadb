from __future__ import annotations

import pytest
import torch
from gpu_checks import assert_near, on_device, rounded_spread
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.gpu.rms_norm import add_rms_norm, rms_norm

EPS = 1e-5


@pytest.mark.parametrize("width", [1, 16, 77, 576])
def test_norms_are_near_the_reference(width):
    x, delta = (rounded_spread(6, width, seed=seed, dtype=torch.float32) for seed in (1, 2))
    weight = rounded_spread(width, seed=3, dtype=torch.float32)
    exact_total, exact = reference.add_rms_norm(x, delta, weight, EPS)
    total, y = add_rms_norm(on_device(x), on_device(delta), on_device(weight), EPS, torch.float32)
    assert_same_bits(total.cpu(), exact_total)
    assert_near(y, exact, 1e-6)
    assert_same_bits(rms_norm(total, on_device(weight), EPS), y.bfloat16())


def test_place_and_strides_do_not_show():
    x, weight = on_device(torch.randn(9, 77)), on_device(torch.randn(77))
    y = rms_norm(x, weight, EPS)
    assert_same_bits(rms_norm(x[3:4], weight, EPS), y[3:4])
    assert_same_bits(rms_norm(x.T.contiguous().T, weight, EPS), y)


def test_gradients_are_those_of_the_formula():
    x, delta = (rounded_spread(6, 40, seed=seed, dtype=torch.float32) for seed in (4, 5))
    weight, slopes = torch.randn(40), torch.randn(6, 40)
    leaves = [t.double().requires_grad_() for t in (x, delta, weight)]
    total = leaves[0] + leaves[1]
    y = total * (total.square().mean(-1, keepdim=True) + EPS).rsqrt() * leaves[2]
    (y * slopes + total).sum().backward()
    on_gpu = [on_device(t).requires_grad_() for t in (x, delta, weight)]
    total, y = add_rms_norm(*on_gpu, EPS, torch.float32)
    (y * on_device(slopes) + total).sum().backward()
    for actual, exact in zip(on_gpu, leaves):
        assert_near(actual.grad, exact.grad, 5e-6)

    (rms_norm(on_gpu[0], on_gpu[2], EPS, torch.float32).sum()).backward()
    assert on_gpu[0].grad.isfinite().all()
