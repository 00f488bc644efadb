"""Card: what the device is called and what its maker says it can do, and how long an operation takes on it."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

NUM_RUNS = 15
FLUSH_BYTES = 512 * 2**20  # written before every timed run: nothing is left in L2, and the host gets ahead


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """Bytes per second of memory, bfloat16 operations per second (dense) of tensor cores."""

    name: str
    bandwidth: float
    flops: float

    def floor_seconds(self, num_bytes: float, num_flops: float = 0.0) -> float:
        """No operation that moves and computes so much can take less."""
        return max(num_bytes / self.bandwidth, num_flops / self.flops)


# By part of the name, the first that fits. Makers' data sheets.
KNOWN = (
    ("H200", 4.8e12, 989e12),
    ("H100 NVL", 3.9e12, 835e12),
    ("H100 PCIe", 2.0e12, 756e12),
    ("H100", 3.35e12, 989e12),
    ("A100-SXM4-80GB", 2.039e12, 312e12),
    ("A100", 1.555e12, 312e12),
)


def card_of(name: str, measured_bandwidth: float) -> Card:
    """The figures of a known card, else the bandwidth that was measured and no limit of operations."""
    for part, bandwidth, flops in KNOWN:
        if part in name:
            return Card(name=name, bandwidth=bandwidth, flops=flops)
    return Card(name=name, bandwidth=measured_bandwidth, flops=float("inf"))


def measured_bandwidth() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / device_seconds(target.copy_, source)


def device_seconds(run: Callable[..., object], *arguments: Any, **options: Any) -> float:
    """Median time of run(*arguments, **options) on the device, with cold L2."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    run(*arguments, **options)
    times = []
    for _ in range(NUM_RUNS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        run(*arguments, **options)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)
