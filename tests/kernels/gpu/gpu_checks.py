"""Where the tests of the GPU kernels run, and comparisons that they share.

Without a CUDA device, Triton's interpreter runs the kernels on the CPU (tests/conftest.py asks for it). It checks what
is read, masked and written where; that bits do not depend on the batch is settled by the tests marked gpu.
"""

from __future__ import annotations

import torch
from kernel_checks import spread

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2}


def on_device(x: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    return x.to(device=DEVICE, dtype=dtype or x.dtype)


def relative_error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    """Largest difference over the largest magnitude of `exact`."""
    return ((actual.cpu().double() - exact.double()).abs().max() / exact.double().abs().max()).item()


def assert_near(actual: torch.Tensor, exact: torch.Tensor, tolerance: float) -> None:
    assert actual.shape == exact.shape
    error = relative_error(actual, exact)
    assert error < tolerance, f"relative error {error:.3g}"  # also fails for NaN


def rounded_spread(*shape: int, seed: int, dtype: torch.dtype, low: int = -3, high: int = 3) -> torch.Tensor:
    """Float32 values that `dtype` holds exactly, with spread exponents."""
    return spread(*shape, seed=seed, low=low, high=high).to(dtype).float()
