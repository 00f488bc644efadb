from __future__ import annotations

import numpy as np
import torch
import triton
import triton.language as tl
from gpu_checks import DEVICE, assert_near, on_device
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.gpu.arithmetic import exp, log, uniform
from kernels.gpu.launch import launch


@triton.jit
def _exp_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, exp(tl.load(x + i)))


@triton.jit
def _log_kernel(x, y, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(y + i, log(tl.load(x + i)))


@triton.jit
def _uniform_kernel(seeds, positions, indices, u, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(u + i, uniform(tl.load(seeds + i), tl.load(positions + i), tl.load(indices + i)))


def test_exponentials_are_near_the_reference():
    x = torch.linspace(-100, 88, 1024, dtype=torch.float32)
    y = torch.empty(1024, device=DEVICE)
    launch(_exp_kernel, (1,), on_device(x), y, BLOCK=1024, num_warps=4)
    exact = torch.from_numpy(reference.exp(x.numpy()))
    assert_near(y.cpu() / exact.clamp(min=1e-38), (exact > 0).float(), 1e-6)  # the interpreter's fma rounds twice


def test_logarithms_equal_the_reference():
    x = torch.exp2(torch.linspace(0, 40, 1024, dtype=torch.float64))
    y = torch.empty(1024, dtype=torch.float64, device=DEVICE)
    launch(_log_kernel, (1,), on_device(x), y, BLOCK=1024, num_warps=4)
    assert_same_bits(y.cpu(), torch.tensor([reference.log(value) for value in x.tolist()], dtype=torch.float64))


def test_random_numbers_equal_the_reference():
    rng = np.random.default_rng(1)
    seeds = torch.from_numpy(rng.integers(-(2**63), 2**63 - 1, 64))
    positions, indices = torch.arange(64) * 31, torch.arange(64)
    u = torch.empty(64, dtype=torch.float64, device=DEVICE)
    launch(_uniform_kernel, (1,), on_device(seeds), on_device(positions), on_device(indices), u, BLOCK=64, num_warps=1)
    exact = [reference.uniform(*one) for one in zip(seeds.tolist(), positions.tolist(), indices.tolist())]
    assert_same_bits(u.cpu(), torch.tensor(exact, dtype=torch.float64))
