"""Lets the tests of the GPU kernels import the helpers that lie beside them; leaves them out where triton is not."""

from __future__ import annotations

import platform
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

# The extra `test` of pyproject.toml asks for triton on these machines; here its absence is a failure.
if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
    collect_ignore_glob = ["test_*.py"]
