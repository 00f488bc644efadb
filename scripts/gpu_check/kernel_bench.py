"""Kernel benchmarks: matrix products beside cuBLAS, attention beside SDPA, and both beside what the card could do."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn.functional import linear as torch_linear
from torch.nn.functional import scaled_dot_product_attention

from kernels.gpu.attention import paged_attention
from kernels.gpu.linear import linear
from kernels.gpu.logprobs import vocab_stats
from scripts.gpu_check.card import Card, device_seconds
from scripts.gpu_check.random_models import MODELS
from scripts.gpu_check.report import Row

BFLOAT16 = torch.bfloat16
NUM_HEADS, NUM_KV_HEADS, HEAD_DIM, BLOCK_SIZE = 16, 8, 128, 16
ROWS = (1, 32, 256, 2048)
DECODE = ((256, 640), (64, 2048), (8, 8192), (1, 32768))  # requests, context
PREFILL = (512, 4096)


def matmul_rows(card: Card, rows: list[Row]) -> None:
    """Products of the shapes of known models."""
    for model, config in MODELS.items():
        for name, num_outputs, width, out_dtype in products(config):
            weight = torch.randn(num_outputs, width, device="cuda", dtype=BFLOAT16)
            for num_rows in ROWS:
                x = torch.randn(num_rows, width, device="cuda", dtype=BFLOAT16)
                num_bytes = 2 * (weight.numel() + x.numel() + num_rows * num_outputs)
                floor = card.floor_seconds(num_bytes, 2.0 * num_rows * num_outputs * width)
                ours = device_seconds(linear, x, weight, out_dtype=out_dtype)
                theirs = device_seconds(torch_linear, x, weight)
                rows.append(_row(f"{model} {name}", f"{num_rows} rows", ours, theirs, floor))


def products(config: dict[str, Any]) -> Iterator[tuple[str, int, int, torch.dtype]]:
    """(name, N, K, type of the result) of the linear layers of a model."""
    D, ffn = config["hidden_size"], config["intermediate_size"]
    heads, kv_heads, head_dim = (
        config[f"{name}"] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    yield "qkv", (heads + 2 * kv_heads) * head_dim, D, BFLOAT16
    yield "output", D, heads * head_dim, torch.float32
    yield "gate_up", 2 * ffn, D, BFLOAT16
    yield "down", D, ffn, torch.float32


def head_rows(card: Card, rows: list[Row]) -> None:
    """The sums over the vocabulary, beside cuBLAS writing the logits and no more."""
    for model, config in MODELS.items():
        vocab_size, width = config["vocab_size"], config["hidden_size"]
        weight = torch.randn(vocab_size, width, device="cuda", dtype=BFLOAT16)
        for num_rows in (1, 256):
            hidden = torch.randn(num_rows, width, device="cuda", dtype=BFLOAT16)
            heat = torch.ones(num_rows, device="cuda")
            floor = card.floor_seconds(2 * weight.numel(), 2.0 * num_rows * weight.numel())
            ours = device_seconds(vocab_stats, hidden, weight, heat)
            theirs = device_seconds(torch_linear, hidden, weight)
            rows.append(_row(f"{model} head", f"{num_rows} rows", ours, theirs, floor))


def attention_rows(card: Card, rows: list[Row]) -> None:
    """Decode and prefill with 16 query heads and 8 key-value heads of 128."""
    for num_requests, context in DECODE:
        keys, values = _dense(num_requests, context), _dense(num_requests, context)
        q = torch.randn(num_requests, NUM_HEADS, HEAD_DIM, device="cuda", dtype=BFLOAT16)
        ours = device_seconds(_paged(q, keys, values, [context - 1] * num_requests, [context] * num_requests))
        theirs = device_seconds(_decode_sdpa(q, keys, values))
        num_bytes = 2 * (keys.numel() + values.numel() + 2 * q.numel())
        floor = card.floor_seconds(num_bytes, 4.0 * num_requests * context * NUM_HEADS * HEAD_DIM)
        rows.append(_row("decode attention", f"{num_requests} x {context}", ours, theirs, floor))
    for length in PREFILL:
        keys, values = _dense(1, length), _dense(1, length)
        q = torch.randn(length, NUM_HEADS, HEAD_DIM, device="cuda", dtype=BFLOAT16)
        ours = device_seconds(_paged(q, keys, values, [0], [length]))
        wide_q = q.transpose(0, 1)[None].contiguous()
        theirs = device_seconds(scaled_dot_product_attention, wide_q, keys, values, is_causal=True, enable_gqa=True)
        floor = card.floor_seconds(4 * (q.numel() + keys.numel()), 2.0 * length * length * NUM_HEADS * HEAD_DIM)
        rows.append(_row("prefill attention", f"1 x {length}", ours, theirs, floor))


def _dense(num_requests: int, context: int) -> torch.Tensor:
    """Keys or values [B, K, context, H] as SDPA wants them."""
    return torch.randn(num_requests, NUM_KV_HEADS, context, HEAD_DIM, device="cuda", dtype=BFLOAT16)


def _decode_sdpa(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> Callable[[], torch.Tensor]:
    """The query heads of a key-value head as rows that see all keys: so no key is read twice."""
    grouped = q.view(q.shape[0], NUM_KV_HEADS, NUM_HEADS // NUM_KV_HEADS, HEAD_DIM)
    return lambda: scaled_dot_product_attention(grouped, keys, values)


def _paged(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, starts: list[int], ends: list[int]
) -> Callable[[], torch.Tensor]:
    """Our attention over the same keys and values, in blocks that lie anywhere."""
    num_requests, context = keys.shape[0], keys.shape[2]
    num_blocks = num_requests * context // BLOCK_SIZE
    places = torch.randperm(num_blocks, device="cuda")
    blocks = [_blocks(x, places) for x in (keys, values)]
    tables = places.view(num_requests, -1).int()
    cu_seqlens = torch.tensor([0, *(end - start for start, end in zip(starts, ends))], device="cuda").cumsum(0).int()
    lengths = torch.tensor(ends, dtype=torch.int32, device="cuda")
    return lambda: paged_attention(q, *blocks, tables, cu_seqlens, lengths, HEAD_DIM**-0.5)


def _blocks(x_BKJH: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """[P, K, S, H] with the i-th block of the sequences, one after the other, at places[i]."""
    split = x_BKJH.unflatten(2, (-1, BLOCK_SIZE)).transpose(1, 2).flatten(0, 1)
    blocks = torch.empty_like(split, memory_format=torch.contiguous_format)
    blocks[places] = split
    return blocks


def _row(what: str, size: str, ours: float, theirs: float, floor: float) -> Row:
    return {
        "what": what, "size": size, "ours_us": ours * 1e6, "torch_us": theirs * 1e6, "floor_us": floor * 1e6,
        "ours_over_torch": ours / theirs, "share_of_floor": floor / ours,
    }  # fmt: skip
