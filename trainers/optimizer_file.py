"""Optimiser file: AdamW's state as safetensors, by parameter name, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from trainers.ranks import NamedTensor

ALIGNMENT = 8  # of the tensors behind the header, in bytes


def save_optimizer(
    path: Path,
    shapes: Mapping[str, tuple[int, ...]],
    named_tensors: Iterable[NamedTensor],
    counters: Mapping[str, int],
) -> None:
    """Writes float32 tensors of these names and shapes, in this order, and the counters as metadata.

    The safetensors package wants all tensors at once, which would be a whole optimiser on one of several ranks; here
    each is written as it comes (format: huggingface.co/docs/safetensors). Raises OSError where the disk does not take
    them.
    """
    with path.open("wb") as file:
        file.write(_header(shapes, counters))
        for (name, shape), (given, tensor) in zip(shapes.items(), named_tensors, strict=True):
            assert (name, shape) == (given, tuple(tensor.shape)), f"{given} of {tuple(tensor.shape)} in place of {name}"
            file.write(tensor.detach().float().cpu().contiguous().reshape(-1).numpy())


def load_optimizer(path: Path) -> tuple[Iterator[NamedTensor], dict[str, int]]:
    """(name, tensor) of what `save_optimizer` wrote, read one at a time, and the counters.

    Raises ValueError for a file that is not readable.
    """
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            counters = {name: int(value) for name, value in (file.metadata() or {}).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is not a readable optimiser file: {error!r}") from error
    return _tensors(path), counters


def _header(shapes: Mapping[str, tuple[int, ...]], counters: Mapping[str, int]) -> bytes:
    """Its length in 8 bytes, then where each tensor stands, as JSON."""
    entries: dict[str, Any] = {"__metadata__": {name: str(value) for name, value in counters.items()}}
    start = 0
    for name, shape in shapes.items():
        end = start + 4 * prod(shape)
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _tensors(path: Path) -> Iterator[NamedTensor]:
    with safe_open(path, framework="pt", device="cpu") as file:
        for name in file.keys():  # noqa: SIM118 (it has no iteration)
            yield name, file.get_tensor(name)
