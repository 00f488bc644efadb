from __future__ import annotations

import pytest
import torch
from gpu_checks import assert_near, on_device, rounded_spread

from kernels import reference
from kernels.gpu.rotary import norm_and_rotary, rotary
from kernels.rotary import rotary_table

EPS = 1e-6
POSITIONS = torch.tensor([0, 1, 7, 250, 299])


@pytest.mark.parametrize("head_dim", [16, 80])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_heads_turn_as_in_the_reference(head_dim, dtype):
    x = rounded_spread(5, 11, head_dim, seed=1, dtype=dtype)
    table = rotary_table(300, head_dim, 1e4)
    exact = reference.rotary(x[:, :9].contiguous(), POSITIONS, table)
    turned = rotary(on_device(x, dtype)[:, :9], on_device(POSITIONS), on_device(table))
    assert turned.dtype is dtype
    assert_near(turned.float(), exact, 1e-6 if dtype is torch.float32 else 5e-3)


def test_heads_are_normed_before_they_turn():
    x, weights = rounded_spread(5, 12, 80, seed=2, dtype=torch.float32), torch.randn(2, 80)
    table = rotary_table(300, 80, 1e4)
    normed = [reference.rms_norm(part.reshape(-1, 80), w, EPS) for part, w in zip(x.split([9, 3], 1), weights)]
    exact = reference.rotary(torch.cat([part.view(5, -1, 80) for part in normed], 1), POSITIONS, table)
    on_gpu = [on_device(t) for t in (x, POSITIONS, table, weights[0], weights[1])]
    assert_near(norm_and_rotary(*on_gpu, 9, EPS), exact, 2e-6)


def test_gradients_turn_back():
    x, slopes = (rounded_spread(5, 3, 16, seed=seed, dtype=torch.float32) for seed in (3, 4))
    table = rotary_table(300, 16, 1e4)
    leaf = on_device(x).requires_grad_()
    rotary(leaf, on_device(POSITIONS), on_device(table)).backward(on_device(slopes))
    assert_near(leaf.grad, _turned(slopes.double(), table, -1), 1e-6)


def test_gradients_of_norm_and_turn():
    x, slopes = (rounded_spread(5, 4, 16, seed=seed, dtype=torch.float32) for seed in (5, 6))
    weights, table = torch.randn(2, 16), rotary_table(300, 16, 1e4)
    leaf, weight = x.double().requires_grad_(), weights.double().requires_grad_()
    normed = (
        leaf
        * (leaf.square().mean(-1, keepdim=True) + EPS).rsqrt()
        * weight[torch.tensor([0, 0, 0, 1]), None].mT.mT[:, 0]
    )
    _turned(normed, table, 1).backward(slopes.double())
    on_gpu = [on_device(t).requires_grad_() for t in (x, weights[0], weights[1])]
    out = norm_and_rotary(on_gpu[0], on_device(POSITIONS), on_device(table), *on_gpu[1:], 3, EPS)
    out.backward(on_device(slopes))
    for actual, exact in zip(on_gpu, (leaf.grad, weight.grad[0], weight.grad[1])):
        assert_near(actual.grad, exact, 5e-6)


def _turned(x, table, sign):
    cosine, sine = table[POSITIONS, None].double().chunk(2, dim=2)
    x1, x2 = x.chunk(2, dim=2)
    return torch.cat([x1 * cosine - x2 * sine * sign, x2 * cosine + x1 * sine * sign], dim=2)
