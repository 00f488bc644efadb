from __future__ import annotations

import subprocess
import sys

import pytest


def _run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_kernels_imports_no_heavy_module():
    code = """
import sys, kernels
heavy = ("torch", "numpy", "transformers", "ctypes", "ray", "triton")
print([name for name in heavy if name in sys.modules], [m for m in sys.modules if m.startswith("kernels.")])
"""
    assert _run(code).split() == ["[]", "[]"]


def test_using_kernels_imports_neither_transformers_nor_ray():
    code = """
import sys, kernels
kernels.fingerprint()
import kernels.attention, kernels.logprobs, kernels.checksum, kernels.reference
print([name for name in ("transformers", "ray", "datasets", "engine") if name in sys.modules])
"""
    assert _run(code).strip() == "[]"


def test_public_names_stay_functions_whatever_was_imported_first():
    """`kernels.linear` is a module and a function of that name; so is `kernels.fingerprint`."""
    for first in ("import kernels", "import kernels.linear, kernels.fingerprint"):
        code = f"""
{first}
import kernels
for name in kernels.__all__:
    for _ in range(2):
        assert callable(getattr(kernels, name)) and type(getattr(kernels, name)).__name__ != "module", name
from kernels.linear import linear, pack_rows
from kernels.fingerprint import fingerprint
from kernels import linear as again
assert again is linear and kernels.fingerprint is fingerprint
print("fine")
"""
        assert _run(code).strip() == "fine"


def test_unknown_names_are_attribute_errors():
    import kernels

    with pytest.raises(AttributeError, match="no attribute 'get_kernel'"):
        kernels.get_kernel  # noqa: B018
    assert not hasattr(kernels, "LayerRepository")


def test_version_stays_clear_of_the_other_package_of_this_name():
    """transformers takes a package `kernels` of version 0.18.2 to 0.19 for Hugging Face's."""
    import kernels

    major, minor, *_ = (int(part) for part in kernels.__version__.split("."))
    assert (major, minor) not in {(0, 18), (0, 19)}
