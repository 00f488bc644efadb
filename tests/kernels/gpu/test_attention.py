from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from gpu_checks import DEVICE, assert_near, on_device, rounded_spread
from kernel_checks import assert_same_bits

from kernels import reference
from kernels.gpu.attention import copy_blocks, kv_store, paged_attention, split_attention, whole_attention

SCALE = 0.25


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """Sequences in blocks on the device, with their q, k and v [J, heads, H] on the CPU."""

    q: list[torch.Tensor]
    k: list[torch.Tensor]
    v: list[torch.Tensor]
    keys: torch.Tensor  # [P, K, S, H]
    values: torch.Tensor  # [P, K, S, H]
    tables: list[list[int]]
    dtype: torch.dtype


def make_case(lengths, num_heads, num_kv_heads, head_dim, *, block_size=16, dtype=torch.float32, seed=0) -> Case:
    """Blocks in random order; every slot that no sequence fills is NaN."""
    counts = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(counts) + 2, generator=torch.Generator().manual_seed(seed)).tolist()
    keys = torch.full((len(order), num_kv_heads, block_size, head_dim), float("nan"), dtype=dtype, device=DEVICE)
    values = keys.clone()
    case = Case(q=[], k=[], v=[], keys=keys, values=values, tables=[], dtype=dtype)
    for at, (length, count) in enumerate(zip(lengths, counts)):
        kv, first_seed = (length, num_kv_heads, head_dim), seed + 3 * at
        case.q.append(rounded_spread(length, num_heads, head_dim, seed=first_seed, dtype=dtype, low=-2, high=2))
        case.k.append(rounded_spread(*kv, seed=first_seed + 1, dtype=dtype, low=-2, high=2))
        case.v.append(rounded_spread(*kv, seed=first_seed + 2, dtype=dtype))
        case.tables.append([order.pop() for _ in range(count)])
        positions = torch.arange(length)
        slots = torch.tensor(case.tables[-1])[positions // block_size] * block_size + positions % block_size
        kv_store(on_device(case.k[-1], dtype), on_device(case.v[-1], dtype), keys, values, on_device(slots))
    return case


def attend(case: Case, rows: list[tuple[int, int, int]], window: int = 0, run=paged_attention) -> list[torch.Tensor]:
    """Attention in one call for entries (sequence, first position, end): the rows from first to end."""
    width = max(len(table) for table in case.tables)
    tables = [case.tables[s] + [10**6] * (width - len(case.tables[s])) for s, _, _ in rows]
    q = torch.cat([case.q[s][first:end] for s, first, end in rows])
    sizes = [end - first for _, first, end in rows]
    starts = torch.tensor([0, *sizes], dtype=torch.int32).cumsum(0).int()
    lengths = torch.tensor([end for _, _, end in rows], dtype=torch.int32)
    out = run(
        on_device(q, case.dtype), case.keys, case.values, on_device(torch.tensor(tables, dtype=torch.int32)),
        on_device(starts), on_device(lengths), SCALE, window,
    )  # fmt: skip
    return list((out[0] if isinstance(out, tuple) else out).cpu().split(sizes))


def expected(case: Case, sequence: int, first: int, end: int, window: int = 0) -> torch.Tensor:
    q, k, v = case.q[sequence], case.k[sequence], case.v[sequence]
    return reference.attention(q[first:end], k[:end], v[:end], SCALE, window)


@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim", "block_size", "window"),
    [(3, 1, 16, 16, 0), (3, 1, 16, 16, 37), (2, 2, 64, 32, 37), (3, 1, 80, 16, 0), (4, 1, 96, 48, 37)],
)
def test_prefill_is_near_the_reference(num_heads, num_kv_heads, head_dim, block_size, window):
    case = make_case([30, 1, 70], num_heads, num_kv_heads, head_dim, block_size=block_size, seed=1)
    rows = [(at, 0, q.shape[0]) for at, q in enumerate(case.q)]
    for at, out in enumerate(attend(case, rows, window)):
        assert_near(out, expected(case, at, *rows[at][1:], window), 5e-6)


def test_bfloat16_is_near_the_reference():
    case = make_case([70], 2, 1, 32, dtype=torch.bfloat16, seed=2)
    (out,) = attend(case, [(0, 0, 70)])
    assert out.dtype is torch.bfloat16
    assert_near(out, expected(case, 0, 0, 70), 1e-2)


@pytest.mark.parametrize("window", [0, 300])
def test_merged_chunks_equal_the_loop_over_chunks(window):
    case = make_case([516, 5], 2, 1, 16, seed=3)
    rows = [(0, 514, 516), (1, 0, 2), (0, 255, 258), (0, 512, 513)]
    looped = attend(case, rows, window, run=whole_attention)
    merged = attend(case, rows, window, run=split_attention)
    for (sequence, first, end), one, other in zip(rows, looped, merged):
        assert_same_bits(one, other)
        assert_near(one, expected(case, sequence, first, end, window), 5e-6)


@pytest.mark.parametrize("window", [pytest.param(0, marks=pytest.mark.slow), 40])
def test_cuts_and_neighbours_do_not_show(window):
    case = make_case([300, 60], 3, 1, 16, seed=4)
    (whole,) = attend(case, [(0, 0, 300)], window, run=whole_attention)
    cuts = [0, 1, 257, 300]
    for first, end in itertools.pairwise(cuts):
        part = attend(case, [(1, 40, 60), (0, first, end), (1, 3, 4)], window, run=whole_attention)[1]
        assert_same_bits(part, whole[first:end])


def test_rows_without_a_slot_are_not_stored():
    keys, values = (torch.zeros(2, 1, 16, 16, device=DEVICE) for _ in range(2))
    k = on_device(torch.ones(3, 1, 16))
    kv_store(k, 2 * k, keys, values, on_device(torch.tensor([17, -1, 3])))
    assert keys.sum() == 32
    assert (keys[1, 0, 1] == 1).all()
    assert (values[0, 0, 3] == 2).all()


def test_rows_to_store_may_be_chosen_and_strided():
    qkv = on_device(torch.arange(5 * 4 * 16, dtype=torch.float32).reshape(5, 4, 16))
    keys, values = (torch.zeros(1, 1, 16, 16, device=DEVICE) for _ in range(2))
    kv_store(qkv[:, 2:3], qkv[:, 3:], keys, values, on_device(torch.tensor([2, 9])), on_device(torch.tensor([4, 1])))
    assert_same_bits(keys[0, 0, [2, 9]], qkv[[4, 1], 2])
    assert_same_bits(values[0, 0, [2, 9]], qkv[[4, 1], 3])


def test_blocks_are_copied_in_order():
    storage = torch.arange(3 * 6 * 1040, dtype=torch.float32).reshape(3, 6, 1040)
    expected_storage = storage.clone()
    pairs = [(0, 1), (1, 4), (5, 0)]
    for source, destination in pairs:
        expected_storage[:, destination] = expected_storage[:, source]
    copied = on_device(storage)
    copy_blocks(copied, on_device(torch.tensor(pairs)))
    assert_same_bits(copied.cpu(), expected_storage)


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "dtype"), [(3, 2, torch.float32), (2, 1, torch.float16)])
def test_shapes_and_types_are_checked(num_heads, num_kv_heads, dtype):
    case = make_case([4], 2, num_kv_heads, 16, seed=5)
    q = torch.zeros(4, num_heads, 16, dtype=dtype, device=DEVICE)
    one = torch.tensor([0, 4], dtype=torch.int32, device=DEVICE)
    with pytest.raises(ValueError, match="must be"):
        whole_attention(q, case.keys, case.values, one[None, :1], one, one[1:], SCALE)
