"""Curves: every metric of a run over its steps, at a resolution that bounds memory and work however long it runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MAX_BUCKETS = 512  # more points than a chart has pixels to show


@dataclass(slots=True)
class Bucket:
    """A metric's values in consecutive steps, summed up."""

    first_step: int
    last_step: int
    total: float
    count: int
    low: float
    high: float

    def add(self, other: Bucket) -> None:
        """Takes in a later bucket."""
        self.last_step = other.last_step
        self.total += other.total
        self.count += other.count
        self.low, self.high = min(self.low, other.low), max(self.high, other.high)


class Curve:
    """One metric: its first and last value, its extremes, and its buckets."""

    def __init__(self) -> None:
        self.buckets: dict[int, Bucket] = {}  # step // stride -> what it held, in order of steps
        self.first: float | None = None
        self.last: float | None = None
        self.count = 0
        self.total = 0.0
        self.num_missing = 0  # values that were no finite number

    def add(self, step: int, value: float, stride: int) -> None:
        self.first = value if self.first is None else self.first
        self.last = value
        self.count += 1
        self.total += value
        self._put(step // stride, Bucket(step, step, value, 1, value, value))

    @property
    def low(self) -> float:
        """The smallest value; NaN where there is none."""
        return min((bucket.low for bucket in self.buckets.values()), default=math.nan)

    @property
    def high(self) -> float:
        """The largest value; NaN where there is none."""
        return max((bucket.high for bucket in self.buckets.values()), default=math.nan)

    def coarsen(self) -> None:
        """Joins neighbouring buckets in pairs."""
        buckets, self.buckets = self.buckets, {}
        for place, bucket in buckets.items():
            self._put(place // 2, bucket)

    def as_json(self) -> dict[str, Any]:
        """Columns over buckets, `first` and `last` in steps; of single values, only `first` and `mean`."""
        buckets = list(self.buckets.values())
        columns = {"first": [bucket.first_step for bucket in buckets]}
        columns["mean"] = [_short(bucket.total / bucket.count) for bucket in buckets]
        if any(bucket.count > 1 for bucket in buckets):
            columns["count"] = [bucket.count for bucket in buckets]
            columns["last"] = [bucket.last_step for bucket in buckets]
            columns["low"] = [_short(bucket.low) for bucket in buckets]
            columns["high"] = [_short(bucket.high) for bucket in buckets]
        return columns | ({"missing": self.num_missing} if self.num_missing else {})

    def _put(self, place: int, bucket: Bucket) -> None:
        if place in self.buckets:
            self.buckets[place].add(bucket)
        else:
            self.buckets[place] = bucket


class Curves:
    """All metrics of a run. Each step costs the same; all buckets hold `stride` steps, a power of two."""

    def __init__(self, max_buckets: int = MAX_BUCKETS) -> None:
        self.max_buckets, self.stride = max_buckets, 1
        self.by_name: dict[str, Curve] = {}
        self.last_step = 0

    def add(self, metrics: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. What is no finite number there (NaN, null) is counted as missing."""
        step = self.last_step = int(metrics["step"])
        while step // self.stride >= self.max_buckets:
            self.stride *= 2
            for curve in self.by_name.values():
                curve.coarsen()
        for name, value in metrics.items():
            if name == "step" or not (value is None or isinstance(value, int | float)):
                continue
            curve = self.by_name.setdefault(name, Curve())
            if value is None or not math.isfinite(value):
                curve.num_missing += 1
            else:
                curve.add(step, float(value), self.stride)

    def get(self, name: str) -> Curve:
        """The curve of that name, or one that has no values."""
        return self.by_name.get(name) or Curve()

    def as_json(self) -> dict[str, dict[str, Any]]:
        return {name: curve.as_json() for name, curve in self.by_name.items() if curve.count or curve.num_missing}


def _short(value: float) -> float:
    """Six significant digits: more than a chart can show. Zero stays zero, and nothing else becomes it."""
    return float(f"{value:.6g}")
