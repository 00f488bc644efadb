"""Rope scaling: rotary frequencies of models whose context was stretched (docs/numerics.md, "Rotary").

Frequencies are made once for each model, so this is the plain Python of the contract and has no faster form. Every
operation on arrays is one float32 operation, in the order in which transformers computes them; only the power is our
own, since its last bit differs between builds of torch.
"""

from __future__ import annotations

import decimal
import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

DIGITS = 40  # decimal, of powers and logarithms before they are rounded


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Every angle divided by the factor (position interpolation: Chen and others, 2023)."""

    factor: float

    attention_factor = 1.0

    def inverse_frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """[head_dim / 2] float32."""
        return _one / powers(head_dim, theta) / _f32(self.factor)


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Long waves divided by the factor, short ones kept, those between blended (Llama 3.1's reference code)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    attention_factor = 1.0

    def inverse_frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """[head_dim / 2] float32."""
        inv_freq, factor = _one / powers(head_dim, theta), _f32(self.factor)
        length, low, high = self.original_max_position_embeddings, self.low_freq_factor, self.high_freq_factor
        wavelength = (_one / inv_freq) * _f32(2 * math.pi)
        share_kept = ((_one / wavelength) * _f32(length) - _f32(low)) / _f32(high - low)
        blended = (_one - share_kept) * inv_freq / factor + share_kept * inv_freq
        shorter = np.where(wavelength < _f32(length / high), inv_freq, blended)
        return np.where(wavelength > _f32(length / low), inv_freq / factor, shorter)


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """Slow dimensions divided by the factor, fast ones kept, a ramp between (YaRN: Peng and others, 2023).

    A dimension is fast if it turns at least beta_fast times over the original context, slow below beta_slow.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float  # by which cosines and sines, and so queries and keys, are multiplied
    beta_fast: float = 32.0
    beta_slow: float = 1.0

    def inverse_frequencies(self, head_dim: int, theta: float) -> np.ndarray:
        """[head_dim / 2] float32."""
        frequencies = powers(head_dim, theta)
        kept, divided = _one / frequencies, _one / (_f32(self.factor) * frequencies)
        share_kept = _one - self._ramp(head_dim, theta)
        return divided * (_one - share_kept) + kept * share_kept

    def _ramp(self, head_dim: int, theta: float) -> np.ndarray:
        """[head_dim / 2] float32: 0 up to the first dimension that is no longer fast, 1 from the first slow one on."""
        first = max(math.floor(self._dimension_turning(self.beta_fast, head_dim, theta)), 0)
        last = min(math.ceil(self._dimension_turning(self.beta_slow, head_dim, theta)), head_dim - 1)
        width = last - first if last != first else 0.001  # a step
        return np.clip((np.arange(head_dim // 2, dtype=np.float32) - _f32(first)) / _f32(width), _f32(0), _one)

    def _dimension_turning(self, num_turns: float, head_dim: int, theta: float) -> decimal.Decimal:
        """Where, as a real number, the dimension lies that turns so often over the original context."""
        with decimal.localcontext(decimal.Context(prec=DIGITS)):
            length = decimal.Decimal(self.original_max_position_embeddings / (num_turns * 2 * math.pi))
            return head_dim * length.ln() / (2 * decimal.Decimal(theta).ln())


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling


def yarn_attention_factor(factor: float) -> float:
    """0.1 ln(factor) + 1, which the YaRN paper recommends; 1 up to a factor of 1."""
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        return float(decimal.Decimal(factor).ln() / 10 + 1) if factor > 1 else 1.0


def powers(head_dim: int, theta: float) -> np.ndarray:
    """theta^(2i / head_dim) for i < head_dim / 2: theta and the exponent rounded to float32, then the power."""
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / _f32(head_dim)
    with decimal.localcontext(decimal.Context(prec=DIGITS)):
        base = decimal.Decimal(float(_f32(theta)))
        return _float32s(base ** decimal.Decimal(float(exponent)) for exponent in exponents)


def _float32s(numbers: Iterable[decimal.Decimal]) -> np.ndarray:
    return np.array([float(number) for number in numbers], dtype=np.float32)


_f32 = np.float32
_one = np.float32(1.0)
