"""The elementary functions of csrc/exp_log.h, in every build this processor runs, against the reference."""

from __future__ import annotations

import ctypes
import functools
import subprocess

import numpy as np
import pytest

from kernels import reference
from kernels.build import FLAGS, INSTRUCTION_SETS, SOURCE_DIRECTORY, available_instruction_sets, find_compiler

_PROBE = """
#include <math.h>
#include "exp_log.h"
void probe_exp(const float *x, float *y, long n) {
    for (long i = 0; i < n; i += 16) v16_store(y + i, v16_exp(v16_load(x + i)));
}
void probe_exp1(const float *x, float *y, long n) { for (long i = 0; i < n; i++) y[i] = exp1(x[i]); }
void probe_log(const double *x, double *y, long n) { for (long i = 0; i < n; i++) y[i] = log1(x[i]); }
void probe_sine(const double *x, double *s, double *c, long n) {
    for (long i = 0; i < n; i++) sine_cosine1(x[i], s + i, c + i);
}
void probe_sum(const float *x, float *y, long n) { for (long i = 0; i < n; i++) y[i] = v16_sum(v16_load(x + 16 * i)); }
void probe_fma(const float *a, const float *b, const float *c, float *y, long n) {
    for (long i = 0; i < n; i += 16) v16_store(y + i, v16_fma(v16_load(a + i), v16_load(b + i), v16_load(c + i)));
}
void probe_keep(const float *x, float *y) {
    for (int a = 0; a <= 16; a++)
        for (int b = 0; b <= 16; b++) v16_store(y + 16 * (17 * a + b), v16_keep(v16_load(x), a, b, -INFINITY));
}
"""


@pytest.fixture(scope="module", params=available_instruction_sets())
def probe(request, tmp_path_factory):
    """Calls a probe_* function on arrays: inputs as they are, then one output for each template."""
    directory = tmp_path_factory.mktemp("probe")
    (directory / "probe.c").write_text(_PROBE)
    flags = [*FLAGS, *INSTRUCTION_SETS[request.param][0], "-I", str(SOURCE_DIRECTORY)]
    command = [find_compiler(), *flags, "-o", str(directory / "probe.so"), str(directory / "probe.c"), "-lm"]
    subprocess.run(command, check=True, capture_output=True)
    loaded = ctypes.CDLL(str(directory / "probe.so"))

    def call(name, inputs, outputs, *count):
        arrays = [*map(np.ascontiguousarray, inputs), *outputs]
        getattr(loaded, name)(*(ctypes.c_void_p(a.ctypes.data) for a in arrays), *map(ctypes.c_long, count))
        return outputs

    return call


def _words(x):
    return x.view(np.int32 if x.dtype == np.float32 else np.int64)


@functools.cache
def _exp_table():
    """(x, exp(x)) over all exponents and both signs, and closely where the result is neither 0 nor infinite."""
    everywhere = np.arange(0, 1 << 32, 8191, dtype=np.uint32).view(np.float32)
    x = np.concatenate([everywhere, np.linspace(-90, 90, 1 << 17, dtype=np.float32)])
    x = x[: x.size // 16 * 16]
    return x, reference.exp(x)


def test_exp_equals_the_reference(probe):
    x, expected = _exp_table()
    (y,) = probe("probe_exp", [x], [np.empty_like(x)], x.size)
    assert np.array_equal(_words(y), _words(expected))
    few = x[::97]
    (one,) = probe("probe_exp1", [few], [np.empty_like(few)], few.size)
    assert np.array_equal(_words(one), _words(y[::97]))


def test_log_equals_the_reference(probe):
    x = np.concatenate([np.geomspace(1.0, 1e9, 20_000), 1.0 + np.geomspace(2.0**-52, 1.0, 2000), [1.0, 2.0, 2.0**0.5]])
    (y,) = probe("probe_log", [x], [np.empty_like(x)], x.size)
    assert np.array_equal(_words(y), _words(np.array([reference.log(value) for value in x.tolist()])))


def test_sine_and_cosine_equal_the_reference(probe):
    x = (
        np.concatenate([np.linspace(0, 100, 50_000), np.linspace(0, 2.0**20, 50_000)])
        .astype(np.float32)
        .astype(np.float64)
    )
    sine, cosine = probe("probe_sine", [x], [np.empty_like(x), np.empty_like(x)], x.size)
    expected_sine, expected_cosine = reference.sine_cosine(x)
    assert np.array_equal(_words(sine), _words(expected_sine))
    assert np.array_equal(_words(cosine), _words(expected_cosine))


def test_fma_and_sum16_equal_the_reference(probe):
    generator = np.random.default_rng(5)
    a, b, c = generator.integers(0, 1 << 32, (3, 1 << 16), dtype=np.uint32).view(np.float32)  # all kinds of numbers
    with np.errstate(over="ignore", invalid="ignore"):
        c[: 1 << 15] = -(a * b)[: 1 << 15]
    finite = np.isfinite(a) & np.isfinite(b) & np.isfinite(c)
    (y,) = probe("probe_fma", [a, b, c], [np.empty_like(a)], a.size)
    assert np.array_equal(_words(y)[finite], _words(reference.fma(a, b, c))[finite])
    lanes = np.ldexp(generator.standard_normal((4096, 16)), generator.integers(-9, 9, (4096, 16))).astype(np.float32)
    (sums,) = probe("probe_sum", [lanes], [np.empty(4096, np.float32)], 4096)
    assert np.array_equal(_words(sums), _words(reference.sum16(lanes)))
    assert not np.array_equal(_words(sums), _words(lanes.sum(1)))  # operands that another order of summation shows in


def test_lanes_out_of_range_are_replaced_whatever_they_hold(probe):
    x = np.full(16, np.nan, np.float32)
    (y,) = probe("probe_keep", [x], [np.empty((17, 17, 16), np.float32)])
    lane = np.arange(16)
    for first in range(17):
        for last in range(17):
            kept = (lane >= first) & (lane < last)
            assert np.isnan(y[first, last][kept]).all()
            assert (y[first, last][~kept] == -np.inf).all()
