"""Lets the kernel tests import the helpers that lie beside them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    """Every test starts with two kernel threads, whatever the one before has set."""
    from kernels.library import set_num_threads

    set_num_threads(2)
    yield
    set_num_threads(2)
