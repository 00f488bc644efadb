from __future__ import annotations

import math
import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from kernels import reference


def _rounded_to_float32(exact: Fraction) -> np.float32:
    """Correct rounding of a fraction to float32, ties to even, by comparing it with the neighbours of a first guess."""
    with np.errstate(over="ignore"):
        guess = np.float32(float(exact))
    near = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    near = [x for x in near if np.isfinite(x)]
    distance = {x: abs(Fraction(float(x)) - exact) for x in near}
    best = min(distance.values())
    return min((x for x in near if distance[x] == best), key=lambda x: int(x.view(np.int32)) & 1)


def test_fma_rounds_once():
    generator = np.random.default_rng(1)
    a, b, c = (np.ldexp(generator.standard_normal(4000), generator.integers(-9, 9, 4000)) for _ in range(3))
    a, b, c = a.astype(np.float32), b.astype(np.float32), c.astype(np.float32)
    c[:1000] = -(a[:1000] * b[:1000])  # cancellation: what is left is the product's rounding error
    c[1000:2000] = np.ldexp(a[1000:2000], -70)  # far below the product
    a[2000:2200] *= np.float32(2.0**-120)  # subnormal results
    b[2000:2200] *= np.float32(2.0**-25)
    c[2000:2200] *= np.float32(2.0**-140)
    expected = [
        _rounded_to_float32(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))) for x, y, z in zip(a, b, c)
    ]
    got = reference.fma(a, b, c)
    assert np.array_equal(got.view(np.int32)[got != 0], np.array(expected, np.float32).view(np.int32)[got != 0])
    assert np.array_equal(got, np.array(expected, np.float32))


def test_fma_does_not_round_twice():
    """A sum that float64 rounds onto the midpoint of two float32, from which a second rounding goes the wrong way."""
    a, b, c = np.float32(1 + 2**-12), np.float32(1 + 2**-12), np.float32(2.0**-80)
    exact = Fraction(float(a)) * Fraction(float(b)) + Fraction(float(c))
    assert np.float32(np.float64(a) * np.float64(b) + np.float64(c)) != _rounded_to_float32(exact)
    assert reference.fma(a, b, c) == _rounded_to_float32(exact)


def test_sum16_is_a_halving_tree():
    lanes = np.array([[2.0**24, 1.0, 1.0] + [0.0] * 5 + [1.0] + [0.0] * 7], np.float32)
    eight = [lanes[0, i] + lanes[0, i + 8] for i in range(8)]
    four = [eight[i] + eight[i + 4] for i in range(4)]
    assert reference.sum16(lanes)[0] == (four[0] + four[2]) + (four[1] + four[3])
    assert reference.sum16(lanes)[0] != lanes.sum(dtype=np.float64)


def test_exp_is_within_one_ulp():
    x = np.linspace(-87.32, 88.72, 200_001, dtype=np.float32)
    exact = np.exp(np.float64(x))
    error = np.abs(np.float64(reference.exp(x)) - exact) / np.spacing(exact.astype(np.float32))
    assert error.max() < 1.0


def test_exp_at_the_ends():
    x = np.float32([-np.inf, -1e30, -87.34, -87.33, -0.0, 0.0, 88.72, 88.73, 89.5, np.inf])
    y = reference.exp(x)
    assert y[:3].view(np.int32).tolist() == [0, 0, 0]
    assert y[3] > np.finfo(np.float32).tiny
    assert y[4:6].tolist() == [1.0, 1.0]
    assert np.isfinite(y[6])
    assert np.isinf(y[7:]).all()


def test_log_is_within_one_ulp():
    x = np.concatenate([np.geomspace(1.0, 1e7, 20_001), 1.0 + np.geomspace(2.0**-52, 1.0, 2001)])
    got = np.array([reference.log(value) for value in x.tolist()])
    exact = np.log(np.longdouble(x))
    assert (np.abs(got - exact) <= np.spacing(np.maximum(np.abs(got), 2.0**-52))).all()
    assert reference.log(1.0) == 0.0


def test_sine_and_cosine_are_within_one_ulp():
    x = np.concatenate([np.linspace(0, 200, 20_001), np.linspace(0, 2.0**20, 20_001)])
    x = np.concatenate([x, np.arange(1, 5000) * np.pi / 2]).astype(np.float32).astype(np.float64)
    sine, cosine = reference.sine_cosine(x)
    assert (np.abs(sine - np.sin(np.longdouble(x))) <= np.spacing(np.abs(sine))).all()
    assert (np.abs(cosine - np.cos(np.longdouble(x))) <= np.spacing(np.abs(cosine))).all()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [  # known answers of Random123, the authors' implementation: philox4x32, 10 rounds
        ((0, 0, 0, 0), 0, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, 0xFFFFFFFFFFFFFFFF, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            0x299F31D0A4093822,
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_known_answers(counter, key, expected):
    assert reference.philox(counter, key) == expected


def test_uniform_fills_the_unit_interval():
    u = np.array([reference.uniform(seed, position, 3) for seed in range(40) for position in range(100)])
    assert ((u >= 0) & (u < 1)).all()
    assert (u * 2.0**53 == np.floor(u * 2.0**53)).all()
    counts = np.histogram(u, 20, (0, 1))[0]
    assert ((counts - 200.0) ** 2 / 200.0).sum() < 60  # 19 degrees of freedom: beyond it once in four million


@pytest.mark.parametrize(
    ("width", "expected"), [(128, 1), (256, 2), (384, 1), (512, 4), (576, 1), (768, 2), (1024, 8), (1536, 4), (2048, 8)]
)
def test_number_of_segments(width, expected):
    assert reference.num_segments(width) == expected


def test_the_page_states_every_coefficient_of_the_c_source():
    """Documentation, reference and C cannot drift apart in a digit."""
    root = Path(reference.__file__).parent
    number = r"\d\.\d{4,}(?:e[-+]?\d+)?|\d+\.\d{3,}"
    page = (root.parent / "docs" / "numerics.md").read_text().replace("\u2212", "-")
    for source in ("csrc/exp_log.h", "reference.py"):
        stated = {float(x) for x in re.findall(number, page)}
        used = {float(x) for x in re.findall(number, (root / source).read_text())}
        assert len(used) > 25
        assert used <= stated | {12582912.0, 6755399441055744.0}, source


def test_the_page_states_the_bits_of_the_constants_of_exp():
    page = (Path(reference.__file__).parent.parent / "docs" / "numerics.md").read_text()
    stated = {int(word, 16) for word in re.findall(r"`([0-9a-f]{8})` \|", page)}
    constants = [reference.EXP_LOWEST, reference.EXP_HIGHEST, reference.LOG2_E, reference.ROUND_MAGIC]
    constants += [reference.LN2_HIGH, -reference.LN2_LOW, *reference.EXP_POLYNOMIAL]
    assert stated == {int(c.view(np.uint32)) for c in constants}


def test_ops_agree_with_float64_torch():
    generator = torch.Generator().manual_seed(3)
    x, w = torch.randn(5, 300, generator=generator), torch.randn(70, 300, generator=generator)
    exact = x.double() @ w.double().T
    assert (reference.linear(x, w) - exact).abs().max() < 1e-5 * exact.abs().max()
    q, k, v = (torch.randn(40, n, 16, generator=generator) for n in (4, 2, 2))
    keys, values = (
        k.double().repeat_interleave(2, 1).transpose(0, 1),
        v.double().repeat_interleave(2, 1).transpose(0, 1),
    )
    exact = torch.nn.functional.scaled_dot_product_attention(q.double().transpose(0, 1), keys, values, is_causal=True)
    assert (reference.attention(q, k, v, 0.25) - exact.transpose(0, 1)).abs().max() < 1e-6
    hidden, temperature, targets = x, torch.full((5,), 0.7), torch.arange(5) * 13
    exact = torch.log_softmax(hidden.double() @ w.double().T / 0.7, 1).gather(1, targets[:, None])[:, 0]
    assert (reference.token_logprobs(hidden, w, targets, temperature) - exact).abs().max() < 1e-4
    assert math.isclose(
        reference.rotary_table(10, 16, 1e4)[7, 8 + 3].item(), math.sin(7 * 1e4 ** (-6 / 16)), rel_tol=1e-6
    )
