"""The table of tiles: every size that shapes a kernel, by the shape of the weight alone. The fingerprint hashes it."""

from __future__ import annotations

import hashlib
from dataclasses import astuple, dataclass

import torch


@dataclass(frozen=True, slots=True, kw_only=True)
class MatmulTile:
    """What one program of a matrix product computes at a time, and how it is run."""

    rows: int  # at least 64: Hopper has one tensor-core instruction from there on, and it serves every number of rows
    columns: int
    depth: int  # k per step; the sum over k is one chain whatever it is, but it is fixed for each (N, K)
    num_warps: int
    num_stages: int
    programs_per_processor: int


# Wide tiles where they occupy all processors; else narrow ones, so that all processors read the weights. Both make the
# same chain over k of the same instruction; the self-test and the tests marked gpu hold their bits equal.
NARROW_ROWS = 64
MIN_TILES = 128  # about the number of processors of an H100 (132)
NARROW_STAGES = {128: 4, 64: 5, 32: 6}  # columns of a narrow tile -> steps in flight, so that two programs fit
WIDE_TILE = MatmulTile(rows=128, columns=128, depth=64, num_warps=8, num_stages=4, programs_per_processor=1)
FLOAT32_TILE = MatmulTile(rows=64, columns=64, depth=32, num_warps=4, num_stages=2, programs_per_processor=2)
ROW_GROUP = 8  # tiles of rows that pass over a column of tiles together, so that they find its weights in L2

QUERY_ROWS = 64  # rows of an attention tile: tokens times the query heads of a key-value head
KEY_TILE = 64  # keys per step of the running softmax, at multiples of it
KEY_CHUNK = 256  # keys between two merges, at multiples of it
MAX_WHOLE_PROGRAMS = 512  # with more programs than these, the device is full without splitting contexts
SPLIT_PROGRAMS = 1024  # about how many share the chunks where contexts are split
MAX_SPLIT_PARTIALS = 8192  # (row, chunk) pairs that a workspace may hold

BACKWARD_TILE = 64  # rows and keys of a step in the backward pass of attention

VOCAB_BLOCK = 64  # ids under one maximum
HEAD_TILE = MatmulTile(rows=64, columns=128, depth=64, num_warps=4, num_stages=4, programs_per_processor=1)
FLOAT32_HEAD_TILE = MatmulTile(rows=64, columns=128, depth=32, num_warps=4, num_stages=1, programs_per_processor=1)

COPY_WORDS = 1024  # 32-bit words of a block that a program copies


def matmul_tile(num_rows: int, num_outputs: int, dtype: torch.dtype) -> MatmulTile:
    """The tile of a product x[T, K] @ weight[N, K].T, T = num_rows and N = num_outputs."""
    if dtype is torch.float32:
        return FLOAT32_TILE
    num_wide = -(-num_rows // WIDE_TILE.rows) * -(-num_outputs // WIDE_TILE.columns)
    is_wide = num_rows > NARROW_ROWS and num_wide >= MIN_TILES
    return WIDE_TILE if is_wide else narrow_tile(num_outputs)


def narrow_tile(num_outputs: int) -> MatmulTile:
    """The widest tile with which the columns alone still occupy all processors, or the narrowest."""
    fits = (columns for columns in NARROW_STAGES if num_outputs >= columns * MIN_TILES)
    columns = next(fits, min(NARROW_STAGES))
    return MatmulTile(
        rows=NARROW_ROWS, columns=columns, depth=64, num_warps=4, num_stages=NARROW_STAGES[columns],
        programs_per_processor=2,
    )  # fmt: skip


def head_tile(dtype: torch.dtype) -> MatmulTile:
    """The tile of logits, one for every number of rows: its width shapes the sums over a vocabulary block."""
    return FLOAT32_HEAD_TILE if dtype is torch.float32 else HEAD_TILE


def row_warps(width: int) -> int:
    """Warps of a program that reduces a row of `width` elements."""
    return 4 if width <= 2048 else 8 if width <= 8192 else 16


def table_digest() -> str:
    """Hex hash of everything above that can shape a sum."""
    constants = {name: value for name, value in globals().items() if name.isupper()}
    facts = [(name, astuple(value) if isinstance(value, MatmulTile) else value) for name, value in constants.items()]
    widths = [(width, row_warps(width)) for width in (1024, 2048, 4096, 8192, 16384)]
    return hashlib.blake2b(repr((sorted(facts), widths)).encode(), digest_size=16).hexdigest()
