"""Lets the engine tests import the helpers that lie beside them, and names the models and profiles they run in."""

from __future__ import annotations

import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if TYPE_CHECKING:
    from exactness_checks import Setting

# The extra `test` of pyproject.toml asks for triton on these machines; there its absence is a failure.
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore = ["test_gpu_engine.py"]

PROFILES = ("float32", "bfloat16", "bfloat16-dot")
TINY_SETTINGS = [pytest.param(("tiny", profile), id=f"tiny-{profile}") for profile in PROFILES]
SMOLLM2_SETTINGS = [
    pytest.param(("smollm2", profile), id=f"smollm2-{profile}", marks=pytest.mark.slow) for profile in PROFILES
]


@pytest.fixture(params=TINY_SETTINGS + SMOLLM2_SETTINGS)
def setting(request: pytest.FixtureRequest) -> Setting:
    """The tiny model in every profile and, among the slow tests, SmolLM2."""
    return _setting(request)


@pytest.fixture(params=TINY_SETTINGS)
def tiny_setting(request: pytest.FixtureRequest) -> Setting:
    """The tiny model in every profile, for what would take too long on a real one."""
    return _setting(request)


def _setting(request: pytest.FixtureRequest) -> Setting:
    from exactness_checks import TINY, Setting

    model, profile = request.param
    if model == "smollm2":
        return Setting(request.getfixturevalue("smollm2_dir"), profile)
    make: Callable[..., Path] = request.getfixturevalue("tiny_model_dir")
    return Setting(make("llama", **TINY), profile)


@pytest.fixture
def two_threads_afterwards() -> Iterator[None]:
    """Leaves two kernel threads to the next test, whatever this one sets."""
    import kernels

    yield
    kernels.set_num_threads(2)
