"""The fingerprint of profile `gpu`: what fixes the bits of these kernels on one kind of device, and a self-test there.

Unlike the CPU's, its bits are not written down anywhere: engine and trainer agree if they have the same kind of device,
compiler, kernels and tiles. That rows do not depend on their batch is tested on the machine itself.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import triton

from kernels.fingerprint import _numbers as numbers
from kernels.gpu.attention import kv_store, split_attention, whole_attention
from kernels.gpu.linear import linear, tiled_linear
from kernels.gpu.logprobs import sample, token_logprobs
from kernels.gpu.rms_norm import add_rms_norm
from kernels.gpu.tiles import (
    KEY_CHUNK,
    MIN_TILES,
    NARROW_ROWS,
    NARROW_STAGES,
    WIDE_TILE,
    MatmulTile,
    narrow_tile,
    table_digest,
)

CONTRACT_VERSION = 1  # of docs/numerics.md, "GPU profile"
HEADS, KV_HEADS, HEAD_DIM, SLOTS = 3, 1, 32, 16


@functools.cache
def fingerprint(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Hex hash of all that fixes bits on a device: contract, types, device, compiler, kernels, tiles and a self-test.

    Raises RuntimeError where rows depend on their batch (see `self_test`).
    """
    facts = (
        "lockstep gpu", CONTRACT_VERSION, str(dtype), _device_kind(device), triton.__version__, source_digest(),
        table_digest(), self_test(device, dtype),
    )  # fmt: skip
    return hashlib.blake2b(repr(facts).encode(), digest_size=16).hexdigest()


def self_test(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> str:
    """Runs the kernels on fixed inputs, in several batches; the hex digest of what they compute.

    Raises RuntimeError when a row's bits depend on the batch: on this device a compiler or an instruction breaks the
    contract, and rollouts from here would match no trainer.
    """
    digest = hashlib.blake2b(digest_size=16)
    with torch.no_grad():
        for name, one, other in _pairs(device, dtype):
            if not torch.equal(one, other):
                raise RuntimeError(
                    f"{name} gives other bits in another batch on {_device_kind(device)} with triton "
                    f"{triton.__version__}: rollouts from here would match no trainer. Use device='cpu', and please "
                    "report the device and the versions"
                )
            digest.update(one.float().contiguous().cpu().numpy().tobytes())
    return digest.hexdigest()


def source_digest() -> str:
    """Hex hash of the text of all GPU kernels."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def _device_kind(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} sm_{properties.major}{properties.minor}"


def _pairs(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """(op, what it gives for some rows in one batch, and in another)."""
    many = NARROW_ROWS + 6
    for width, num_outputs in ((72, 70), (320, 130)):
        x, weight = _on(device, dtype, many, width, seed=1), _on(device, dtype, num_outputs, width, seed=2)
        y = linear(x, weight, out_dtype=torch.float32)
        yield "linear", y[5:9], linear(x[5:9], weight, out_dtype=torch.float32)
        for tile in _other_tiles(dtype):
            yield f"linear with {tile.columns} columns", y, tiled_linear(x, weight, None, torch.float32, tile)
    x, delta = (_on(device, torch.float32, 9, 77, seed=seed) for seed in (3, 4))
    weight = _on(device, torch.float32, 77, seed=5)
    normed = add_rms_norm(x, delta, weight, 1e-5, dtype)[1]
    yield "add_rms_norm", normed[7:8], add_rms_norm(x[7:8], delta[7:8], weight, 1e-5, dtype)[1]
    yield "attention", *_attention_pair(device, dtype)
    hidden, weight = _on(device, dtype, many, 72, seed=9, low=-3), _on(device, dtype, 200, 72, seed=10, low=-4, high=0)
    number = torch.arange(6, device=device)
    rows, heat = number * 13, torch.linspace(0.5, 2, many, device=device)
    token_ids, logprobs = sample(
        hidden, weight, heat, rows, number << 40, number, number, (number == 1).to(torch.uint8)
    )
    yield "sample", logprobs, token_logprobs(hidden[rows], weight, token_ids, heat[rows])


def _other_tiles(dtype: torch.dtype) -> Iterator[MatmulTile]:
    if dtype is torch.bfloat16:
        yield WIDE_TILE
        yield from (narrow_tile(columns * MIN_TILES) for columns in NARROW_STAGES)


def _attention_pair(device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """The last rows of a sequence, all chunks in one program; and one by one, the chunks shared by several."""
    length, num_rows = KEY_CHUNK + 20, 3
    q = _on(device, dtype, num_rows, HEADS, HEAD_DIM, seed=6, low=-3, high=1)
    k, v = (_on(device, dtype, length, KV_HEADS, HEAD_DIM, seed=seed, low=-3, high=1) for seed in (7, 8))
    num_blocks = math.ceil(length / SLOTS)
    keys = torch.empty(num_blocks, KV_HEADS, SLOTS, HEAD_DIM, dtype=dtype, device=device)
    values, slots = torch.empty_like(keys), torch.arange(length, device=device)
    kv_store(k, v, keys, values, slots)
    table = torch.arange(num_blocks, device=device, dtype=torch.int32).expand(num_rows, -1).contiguous()
    starts, ends = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, num_rows], [length]))
    whole = whole_attention(q, keys, values, table[:1], starts, ends, HEAD_DIM**-0.5)[0]
    singles = torch.arange(num_rows + 1, device=device, dtype=torch.int32)
    lengths = singles[1:] + (length - num_rows)
    return whole, split_attention(q, keys, values, table, singles, lengths, HEAD_DIM**-0.5)


def _on(device: torch.device, dtype: torch.dtype, *shape: int, seed: int, low: int = -5, high: int = 5) -> torch.Tensor:
    return numbers(*shape, seed=seed, low=low, high=high).to(device=device, dtype=dtype)
