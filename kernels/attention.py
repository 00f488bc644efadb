"""Attention over blocks of keys and values, for engine and trainer (docs/numerics.md, "Attention").

Key blocks of a layer are [P, K, H, S], value blocks [P, K, S, H]: P blocks, K key-value heads, H head width, S slots.
Both are float32 or both bfloat16; keys and values are rounded to that type when they are stored, before anything uses
them, and widened exactly when they are read.
"""

from __future__ import annotations

import torch

from kernels.library import library
from kernels.linear import check_float32

HEAD_DIM_MULTIPLE = 16
MAX_HEAD_DIM = 256
SLOTS_MULTIPLE = 16
KV_DTYPES = (torch.float32, torch.bfloat16)


def check_attention_shape(head_dim: int, block_size: int) -> None:
    """Raises ValueError for a head width or a block size that the kernel does not take."""
    if head_dim % HEAD_DIM_MULTIPLE or not 0 < head_dim <= MAX_HEAD_DIM:
        raise ValueError(f"head_dim={head_dim} must be a multiple of {HEAD_DIM_MULTIPLE} up to {MAX_HEAD_DIM}")
    if block_size % SLOTS_MULTIPLE or block_size <= 0:
        raise ValueError(f"block_size={block_size} must be a positive multiple of {SLOTS_MULTIPLE}")


def kv_store(
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    slot_mapping: torch.Tensor,
    rows: torch.Tensor | None = None,
) -> None:
    """Writes rows of k and v into slots, in place: row `rows[i]` goes to slot_mapping[i] = block * S + slot.

    Bfloat16 blocks get the nearest bfloat16, ties to even.
    slot_mapping and rows are int64; rows None stands for 0, 1, 2, ... k and v may be strided over rows.
    """
    _, num_kv_heads, head_dim, num_slots = key_blocks.shape
    k, v = _adjacent_heads(k_TKH), _adjacent_heads(v_TKH)
    is_bf16 = _is_bfloat16(key_blocks, value_blocks)
    library().ls_kv_store(
        k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), key_blocks.data_ptr(), value_blocks.data_ptr(), is_bf16,
        None if rows is None else rows.data_ptr(), slot_mapping.data_ptr(), slot_mapping.shape[0],
        num_kv_heads, head_dim, num_slots,
    )  # fmt: skip


def copy_blocks(storage: torch.Tensor, pairs: list[tuple[int, int]]) -> None:
    """Copies blocks, (source, destination) pair by pair in order, in every plane of storage [planes, P, ...]."""
    if not pairs:
        return
    flat = torch.tensor([*pairs, (-1, -1)], dtype=torch.int64)
    num_planes, num_blocks = storage.shape[:2]
    block_bytes = storage[0, 0].numel() * storage.element_size()
    library().ls_copy_blocks(storage.data_ptr(), flat.data_ptr(), num_planes, num_blocks, block_bytes)


def paged_attention(
    q_TNH: torch.Tensor,
    key_blocks: torch.Tensor,
    value_blocks: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens_q: torch.Tensor,
    seq_lens: torch.Tensor,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """out[T, N, H]: rows [cu_seqlens_q[b], cu_seqlens_q[b + 1]) are the last of seq_lens[b] positions of sequence b.

    block_tables [B, max_blocks], cu_seqlens_q [B + 1] and seq_lens [B] are int32. `window` > 0 limits how many keys a
    row sees, itself included.
    """
    return _attention(q_TNH, key_blocks, value_blocks, block_tables, cu_seqlens_q, seq_lens, scale, window, None, None)


def _adjacent_heads(x_TNH: torch.Tensor) -> torch.Tensor:
    """x itself where the heads of a row lie side by side, as the kernels read them; else a copy that is so."""
    check_float32(x_TNH, "q, k or v")
    return x_TNH if x_TNH.stride(2) == 1 and x_TNH.stride(1) == x_TNH.shape[2] else x_TNH.contiguous()


def _is_bfloat16(key_blocks: torch.Tensor, value_blocks: torch.Tensor) -> bool:
    dtype = key_blocks.dtype
    if dtype not in KV_DTYPES or value_blocks.dtype is not dtype:
        raise ValueError(f"key and value blocks are {dtype} and {value_blocks.dtype}: both must be float32 or bfloat16")
    return dtype is torch.bfloat16


def _attention(q, key_blocks, value_blocks, tables, starts, lengths, scale, window, row_max, row_sum):
    num_rows, num_heads, head_dim = q.shape
    _, num_kv_heads, _, num_slots = key_blocks.shape
    q = _adjacent_heads(q)
    out = q.new_empty(num_rows, num_heads, head_dim)
    failed = library().ls_attention(
        q.data_ptr(), q.stride(0), key_blocks.data_ptr(), value_blocks.data_ptr(),
        _is_bfloat16(key_blocks, value_blocks), tables.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
        out.data_ptr(), None if row_max is None else row_max.data_ptr(),
        None if row_sum is None else row_sum.data_ptr(), lengths.shape[0], num_heads, num_kv_heads, head_dim, num_slots,
        tables.shape[1], window, scale,
    )  # fmt: skip
    if failed:
        raise MemoryError("attention found no memory for its tasks")
    return out


def packed_attention(
    q_TNH: torch.Tensor,
    k_TKH: torch.Tensor,
    v_TKH: torch.Tensor,
    plan: PackedPlan,
    scale: float,
    window: int = 0,
) -> torch.Tensor:
    """out[T, N, H] for a packed batch, differentiable: the rows are laid out in blocks, then `paged_attention` runs."""
    if torch.is_grad_enabled() and (q_TNH.requires_grad or k_TKH.requires_grad or v_TKH.requires_grad):
        return _PackedAttention.apply(q_TNH, k_TKH, v_TKH, plan, scale, window)
    return _packed_forward(q_TNH, k_TKH, v_TKH, plan, scale, window, None, None)


class PackedPlan:
    """Where the rows of a packed batch lie in blocks, for `packed_attention`.

    Args:
        segments: (first_row, end_row, parent) of each run of consecutive rows. Its keys are the rows of its parent (an
            index of an earlier segment, or -1), then its own, causally. The segments that share a parent follow it at
            once.
        block_size: slots of a block, a multiple of 16; it does not change the result.
        kv_dtype: in what keys and values are kept, float32 or bfloat16; the engine's, for equal bits.

    A child whose parent ends inside a block gets a copy of that block's rows, as the engine's copy-on-write gives it.
    """

    def __init__(
        self, segments: list[tuple[int, int, int]], block_size: int = 16, kv_dtype: torch.dtype = torch.float32
    ) -> None:
        self.block_size, self.kv_dtype = block_size, kv_dtype
        rows, slots, tables, lengths = [], [], [], []
        num_blocks = 0
        for first, end, parent in segments:
            prefix = range(0) if parent < 0 else range(segments[parent][0], segments[parent][1])
            shared = len(prefix) // block_size
            own = [*prefix[shared * block_size :], *range(first, end)]
            count = -(-len(own) // block_size)
            slots.extend(range(num_blocks * block_size, num_blocks * block_size + len(own)))
            rows.extend(own)
            tables.append([*(tables[parent][:shared] if parent >= 0 else []), *range(num_blocks, num_blocks + count)])
            lengths.append(len(prefix) + end - first)
            num_blocks += count
        width = max(map(len, tables), default=1)
        self.num_blocks = num_blocks
        self.num_rows = segments[-1][1] if segments else 0
        self.rows = torch.tensor(rows, dtype=torch.int64)
        self.slot_mapping = torch.tensor(slots, dtype=torch.int64)
        self.block_tables = torch.tensor([table + [0] * (width - len(table)) for table in tables], dtype=torch.int32)
        self.cu_seqlens_q = torch.tensor([0, *(end for _, end, _ in segments)], dtype=torch.int32)
        self.seq_lens = torch.tensor(lengths, dtype=torch.int32)
        self.segments = torch.tensor(segments, dtype=torch.int64).reshape(-1, 3)
        roots = [index for index, (_, _, parent) in enumerate(segments) if parent < 0]
        self.groups = torch.tensor([*roots, len(segments)], dtype=torch.int64)
        self._check(segments)
        self._scratch: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    @staticmethod
    def _check(segments: list[tuple[int, int, int]]) -> None:
        at, root = 0, -1
        for index, (first, end, parent) in enumerate(segments):
            if first != at or end < first:
                raise ValueError(f"segment {index} covers rows {first}..{end} but must begin at row {at}")
            if parent >= 0 and parent != root:
                raise ValueError(
                    f"segment {index} has parent {parent}, but only segment {root} directly precedes its children"
                )
            at, root = end, index if parent < 0 else root

    def blocks(self, num_kv_heads: int, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value blocks to work in; one pair serves all layers in turn, since only the forward pass reads it."""
        key = (num_kv_heads, head_dim)
        if key not in self._scratch:
            shape = (self.num_blocks, num_kv_heads, head_dim, self.block_size)
            keys = torch.empty(shape, dtype=self.kv_dtype, device="cpu")
            self._scratch[key] = (keys, torch.empty_like(keys).reshape(*shape[:2], self.block_size, head_dim))
        return self._scratch[key]


def _packed_forward(q, k, v, plan, scale, window, row_max, row_sum):
    key_blocks, value_blocks = plan.blocks(k.shape[1], k.shape[2])
    kv_store(k, v, key_blocks, value_blocks, plan.slot_mapping, plan.rows)
    tables, starts, lengths = plan.block_tables, plan.cu_seqlens_q, plan.seq_lens
    return _attention(q, key_blocks, value_blocks, tables, starts, lengths, scale, window, row_max, row_sum)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, plan, scale, window):
        q, k, v = _adjacent_heads(q), _adjacent_heads(k), _adjacent_heads(v)
        if plan.kv_dtype is not torch.float32:  # gradients pass straight through the rounding
            k, v = k.to(plan.kv_dtype).float(), v.to(plan.kv_dtype).float()
        row_max, row_sum = q.new_empty(q.shape[:2]), q.new_empty(q.shape[:2])
        out = _packed_forward(q, k, v, plan, scale, window, row_max, row_sum)
        ctx.save_for_backward(q, k, v, out, row_max, row_sum)
        ctx.plan, ctx.scale, ctx.window = plan, scale, window
        return out

    @staticmethod
    def backward(ctx, grad):
        q, k, v, out, row_max, row_sum = ctx.saved_tensors
        grad = grad.contiguous()
        dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
        plan = ctx.plan
        failed = library().ls_attention_backward(
            q.data_ptr(), q.stride(0), k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), out.data_ptr(),
            grad.data_ptr(), row_max.data_ptr(), row_sum.data_ptr(), dq.data_ptr(), dk.data_ptr(), dv.data_ptr(),
            plan.segments.data_ptr(), plan.groups.data_ptr(), plan.groups.shape[0] - 1, q.shape[1], k.shape[1],
            q.shape[2], ctx.window, ctx.scale,
        )  # fmt: skip
        if failed:
            raise MemoryError("the backward pass of attention found no memory for its tasks")
        return dq, dk, dv, None, None, None
