from __future__ import annotations

import pytest
import torch
from gpu_checks import DEVICE

from kernels.gpu import fingerprint as fingerprint_module
from kernels.gpu.fingerprint import fingerprint, self_test, source_digest
from kernels.gpu.tiles import table_digest


@pytest.mark.slow
def test_a_device_has_one_fingerprint():
    again = fingerprint.__wrapped__(DEVICE, torch.bfloat16)  # runs the self-test again
    assert fingerprint(DEVICE, torch.bfloat16) == again


@pytest.mark.parametrize(("dtype", "outputs"), [(torch.float32, "a"), (torch.bfloat16, "b")])
def test_types_and_what_the_self_test_computes_are_part_of_it(monkeypatch, dtype, outputs):
    monkeypatch.setattr(fingerprint_module, "self_test", lambda device, dtype: "a")
    before = fingerprint.__wrapped__(DEVICE, torch.bfloat16)
    monkeypatch.setattr(fingerprint_module, "self_test", lambda device, dtype: outputs)
    assert fingerprint.__wrapped__(DEVICE, dtype) != before


def test_a_kernel_that_depends_on_the_batch_is_refused(monkeypatch):
    def uneven(x, weight, out_dtype):
        return (x.float() @ weight.float().T) * (1 + 1e-6 * x.shape[0])

    monkeypatch.setattr(fingerprint_module, "linear", uneven)
    with pytest.raises(RuntimeError, match="linear gives other bits in another batch"):
        self_test(DEVICE)


def test_sources_and_tiles_are_part_of_it(monkeypatch):
    before = table_digest()
    monkeypatch.setattr("kernels.gpu.tiles.KEY_CHUNK", 512)
    assert table_digest() != before
    assert len(source_digest()) == 32
