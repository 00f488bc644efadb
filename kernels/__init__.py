"""Batch-invariant kernels: plain tensors in, plain tensors out, the same bits whatever the batch.

Importing this package costs nothing: no torch, no compiler. Names are looked up on first use, since other libraries may
import a package of this name just to see whether it is there.
"""

from __future__ import annotations

import importlib
import sys
import types

_HOMES = {
    "set_num_threads": "kernels.library",
    "get_num_threads": "kernels.library",
    "instruction_set": "kernels.library",
    "fingerprint": "kernels.fingerprint",
    "self_test": "kernels.fingerprint",
    "linear": "kernels.linear",
    "embedding": "kernels.linear",
    "rms_norm": "kernels.rms_norm",
    "add_rms_norm": "kernels.rms_norm",
    "rotary": "kernels.rotary",
    "silu_and_mul": "kernels.activation",
    "token_logprobs": "kernels.logprobs",
}

__version__ = "0.1.0"
__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Finds a public name in its module (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


class _Package(types.ModuleType):
    """Keeps `kernels.linear` the function: importing the module of that name would otherwise bind the module here."""

    def __setattr__(self, name: str, value: object) -> None:
        is_namesake = isinstance(value, types.ModuleType) and _HOMES.get(name) == value.__name__
        super().__setattr__(name, getattr(value, name) if is_namesake else value)


sys.modules[__name__].__class__ = _Package
