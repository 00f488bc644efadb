from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import kernels
from kernels.fingerprint import SELF_TEST_DIGESTS, fingerprint, self_test, self_test_digest
from kernels.library import set_num_threads
from kernels.profiles import PROFILES

_MODULE = sys.modules["kernels.fingerprint"]


@pytest.mark.parametrize("profile", PROFILES)
def test_this_machine_computes_the_recorded_bits(profile):
    self_test(profile)
    assert self_test_digest(profile) == SELF_TEST_DIGESTS[profile]


@pytest.mark.parametrize("num_threads", [1, 2, 3, 4])
@pytest.mark.parametrize("profile", PROFILES)
def test_threads_are_no_part_of_it(profile, num_threads):
    set_num_threads(num_threads)
    assert self_test_digest(profile) == SELF_TEST_DIGESTS[profile]


def test_settings_of_torch_are_no_part_of_it():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.set_flush_denormal(True)
        assert self_test_digest() == SELF_TEST_DIGESTS["float32"]
    finally:
        torch.set_default_dtype(torch.float32)
        torch.set_flush_denormal(False)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.fixture
def _fresh():
    fingerprint.cache_clear()
    yield
    fingerprint.cache_clear()


@pytest.mark.usefixtures("_fresh")
def test_fingerprint_changes_with_what_fixes_the_bits(monkeypatch):
    seen = {fingerprint("float32")}
    assert fingerprint() in seen
    seen.update(fingerprint(profile) for profile in PROFILES)
    assert len(seen) == len(PROFILES)
    assert all(len(value) == 32 and int(value, 16) >= 0 for value in seen)
    changes = [
        (_MODULE, "CONTRACT_VERSION", 99),
        (_MODULE.reference, "KEY_CHUNK", 512),
    ]
    for module, name, value in changes:
        with monkeypatch.context() as patch:
            patch.setattr(module, name, value)
            fingerprint.cache_clear()
            seen.add(fingerprint("float32"))
    assert len(seen) == len(PROFILES) + len(changes)


@pytest.mark.usefixtures("_fresh")
def test_a_kernel_that_is_off_by_one_bit_is_refused(monkeypatch):
    honest = _MODULE.rms_norm

    def off_by_one_bit(*args):
        y = honest(*args)
        y.view(torch.int32)[0, 0] ^= 1
        return y

    monkeypatch.setattr(_MODULE, "rms_norm", off_by_one_bit)
    with pytest.raises(RuntimeError, match=SELF_TEST_DIGESTS["float32"]) as raised:
        self_test()
    for part in (self_test_digest(), kernels.instruction_set(), _MODULE.platform.node(), "float32"):
        assert part in str(raised.value)
    with pytest.raises(RuntimeError):
        fingerprint("float32")


def test_torch_linear_in_place_of_ours_is_refused(monkeypatch):
    weights = {}

    def remember(packed, rows, first_row=0):
        weights[packed.data_ptr()] = rows

    def torch_linear(x, packed, num_outputs, bias, is_dot):
        return torch.nn.functional.linear(x, weights[packed.data_ptr()], bias)

    monkeypatch.setattr(_MODULE, "pack_rows", remember)
    monkeypatch.setattr(_MODULE, "linear", torch_linear)
    with pytest.raises(RuntimeError, match="instruction set"):
        self_test()


def test_unknown_profile_is_named():
    with pytest.raises(ValueError, match="profile='float16' must be one of: float32, bfloat16, bfloat16-dot"):
        fingerprint("float16")


def test_it_is_the_same_in_another_process():
    code = "import kernels; kernels.self_test(); print(kernels.fingerprint())"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == fingerprint("float32")
