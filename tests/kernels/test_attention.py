from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from kernel_checks import SEGMENTS, Sequence, assert_same_bits, make_sequence, num_different, packed_rows, spread

from kernels import reference
from kernels.attention import (
    PackedPlan,
    check_attention_shape,
    copy_blocks,
    kv_store,
    packed_attention,
    paged_attention,
)
from kernels.library import set_num_threads

SCALE = 0.25
LENGTH = 620  # three chunks of keys: 256, 256, 108
WINDOWS = (0, 5, 100, 300)
KV_DTYPES = (torch.float32, torch.bfloat16)
both_kv_dtypes = pytest.mark.parametrize("kv_dtype", KV_DTYPES, ids=("float32", "bfloat16"))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cache:
    keys: torch.Tensor  # [P, K, H, S]
    values: torch.Tensor  # [P, K, S, H]
    tables: list[list[int]]  # blocks of each sequence


def expected_of(s: Sequence, window: int = 0, kv_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    k, v = reference.round_kv(s.k, kv_dtype), reference.round_kv(s.v, kv_dtype)
    return reference.attention(s.q, k, v, SCALE, window)


def store(
    sequences: list[Sequence], block_size: int = 16, kv_dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> Cache:
    """Blocks in random order; every slot that no sequence fills is NaN, and so are some whole blocks."""
    _, num_kv_heads, head_dim = sequences[0].k.shape
    counts = [-(-s.k.shape[0] // block_size) for s in sequences]
    order = torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(seed)).tolist()
    keys = torch.full((len(order), num_kv_heads, head_dim, block_size), float("nan"), dtype=kv_dtype)
    values = torch.full((len(order), num_kv_heads, block_size, head_dim), float("nan"), dtype=kv_dtype)
    tables = []
    for sequence, count in zip(sequences, counts):
        tables.append([order.pop() for _ in range(count)])
        positions = torch.arange(sequence.k.shape[0])
        slots = torch.tensor(tables[-1])[positions // block_size] * block_size + positions % block_size
        kv_store(sequence.k, sequence.v, keys, values, slots)
    return Cache(keys=keys, values=values, tables=tables)


def attend(cache: Cache, rows: list[tuple[int, torch.Tensor, int]], window: int = 0) -> list[torch.Tensor]:
    """Attention in one call for entries (sequence, query rows, number of positions so far)."""
    width = max(len(table) for table in cache.tables)
    tables = [cache.tables[s] + [10**6] * (width - len(cache.tables[s])) for s, _, _ in rows]
    lengths = [q.shape[0] for _, q, _ in rows]
    starts = torch.tensor([0, *lengths]).cumsum(0).int()
    q = torch.cat([q for _, q, _ in rows])
    seq_lens = torch.tensor([seen for _, _, seen in rows], dtype=torch.int32)
    block_tables = torch.tensor(tables, dtype=torch.int32)
    out = paged_attention(q, cache.keys, cache.values, block_tables, starts, seq_lens, SCALE, window)
    return list(out.split(lengths))


@functools.cache
def long_sequence() -> Sequence:
    return make_sequence(LENGTH, 3, 1, 16, seed=100)


@functools.cache
def long_expected(window: int, kv_dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return expected_of(long_sequence(), window, kv_dtype)


@both_kv_dtypes
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_dim"),
    [(2, 2, 16), (9, 3, 64), (7, 1, 80), (4, 2, 96), (3, 1, 128), (2, 1, 144), (1, 1, 256), (14, 2, 32), (34, 17, 48)],
)
def test_prefill_equals_the_reference(num_heads, num_kv_heads, head_dim, kv_dtype):
    s = make_sequence(45, num_heads, num_kv_heads, head_dim, seed=1)
    cache = store([s], kv_dtype=kv_dtype)
    expected = expected_of(s, kv_dtype=kv_dtype)
    (out,) = attend(cache, [(0, s.q, 45)])
    assert_same_bits(out, expected)
    (last,) = attend(cache, [(0, s.q[44:], 45)])
    assert_same_bits(last, expected[44:])


def test_scores_from_near_the_maximum_to_where_exp_vanishes_equal_the_reference():
    """Differences from the maximum up to several hundred: exponentials become tiny at 87.3, then zero."""
    s = make_sequence(300, 2, 1, 16, seed=2)
    s = dataclasses.replace(s, q=20 * s.q)
    scores = torch.einsum("jh,kh->jk", s.q[:, 0], s.k[:, 0]) * SCALE
    below = scores.max(1, keepdim=True).values - scores
    assert ((below > 86) & (below < 87.3)).any()
    assert (below > 100).any()
    (out,) = attend(store([s]), [(0, s.q, 300)])
    assert_same_bits(out, expected_of(s))


@both_kv_dtypes
@pytest.mark.parametrize("window", WINDOWS)
def test_long_contexts_equal_the_reference(window, kv_dtype):
    s = long_sequence()
    (out,) = attend(store([s], kv_dtype=kv_dtype), [(0, s.q, LENGTH)], window)
    assert_same_bits(out, long_expected(window, kv_dtype))


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "window"), [(1, 1, 100), (7, 1, 257), (6, 2, 3)])
def test_windows_of_every_group_size_equal_the_reference(num_heads, num_kv_heads, window):
    s = make_sequence(290, num_heads, num_kv_heads, 16, seed=4)
    (out,) = attend(store([s]), [(0, s.q, 290)], window)
    assert_same_bits(out, expected_of(s, window))


@both_kv_dtypes
def test_decode_equals_prefill(kv_dtype):
    s = long_sequence()
    cache = store([s], kv_dtype=kv_dtype)
    for window in WINDOWS:
        rows = [(0, s.q[i : i + 1], i + 1) for i in range(LENGTH)]
        assert_same_bits(torch.cat(attend(cache, rows, window)), long_expected(window, kv_dtype))
    alone = [attend(cache, [(0, s.q[i : i + 1], i + 1)])[0] for i in (0, 1, 15, 16, 255, 256, 511, 512, 619)]
    expected = long_expected(0, kv_dtype)[[0, 1, 15, 16, 255, 256, 511, 512, 619]]
    assert_same_bits(torch.cat(alone), expected)


@both_kv_dtypes
@pytest.mark.parametrize("window", [0, 100])
def test_a_prompt_cut_anywhere_gives_the_same_bits(window, kv_dtype):
    s, cache = long_sequence(), store([long_sequence()], kv_dtype=kv_dtype)
    expected = long_expected(window, kv_dtype)
    for cut in range(1, LENGTH):
        (head,) = attend(cache, [(0, s.q[:cut], cut)], window)
        (tail,) = attend(cache, [(0, s.q[cut:], LENGTH)], window)
        assert_same_bits(torch.cat([head, tail]), expected)


@both_kv_dtypes
@pytest.mark.parametrize("block_size", [16, 32, 48])
@pytest.mark.parametrize("num_threads", [1, 2, 3, 4, 7])
def test_mixed_batches_blocks_and_threads_do_not_show(block_size, num_threads, kv_dtype):
    """Random chunks of several sequences in one step, in blocks that lie anywhere."""
    set_num_threads(num_threads)
    sequences = [long_sequence(), *(short_sequence(n) for n in (1, 31, 63, 200))]
    expected = [long_expected(0, kv_dtype), *(short_expected(n, kv_dtype) for n in (1, 31, 63, 200))]
    cache = store(sequences, block_size, kv_dtype, seed=block_size)
    generator = torch.Generator().manual_seed(block_size + num_threads)
    for _ in range(6):
        rows, wanted = [], []
        for i in torch.randperm(len(sequences), generator=generator).tolist():
            first, end = sorted(torch.randint(0, sequences[i].q.shape[0] + 1, (2,), generator=generator).tolist())
            rows.append((i, sequences[i].q[first:end], end))
            wanted.append(expected[i][first:end])
        assert_same_bits(torch.cat(attend(cache, rows)), torch.cat(wanted))


@functools.cache
def short_sequence(length: int) -> Sequence:
    return make_sequence(length, 3, 1, 16, seed=length)


@functools.cache
def short_expected(length: int, kv_dtype: torch.dtype) -> torch.Tensor:
    return expected_of(short_sequence(length), kv_dtype=kv_dtype)


@both_kv_dtypes
def test_a_context_shared_out_between_threads_gives_the_same_bits(kv_dtype):
    """Few rows over many keys: chunks are computed by several threads, whatever their number, and merged in order."""
    s = make_sequence(2600, 4, 2, 16, seed=200)
    cache = store([s], kv_dtype=kv_dtype)
    for num_rows, window in ((1, 0), (3, 0), (40, 1500)):
        k, v = reference.round_kv(s.k, kv_dtype), reference.round_kv(s.v, kv_dtype)
        expected = reference.attention(s.q[-num_rows:], k, v, SCALE, window)
        for num_threads in range(1, 8):
            set_num_threads(num_threads)
            (out,) = attend(cache, [(0, s.q[-num_rows:], 2600)], window)
            assert_same_bits(out, expected)
    set_num_threads(7)
    others = [(0, s.q[n - 1 : n], n) for n in (1, 300, 2000)]
    assert_same_bits(attend(cache, [*others, (0, s.q[-1:], 2600)])[-1], expected_of_last_row(s, kv_dtype))


def expected_of_last_row(s: Sequence, kv_dtype: torch.dtype) -> torch.Tensor:
    return expected_of(dataclasses.replace(s, q=s.q[-1:]), kv_dtype=kv_dtype)


@pytest.mark.slow
@both_kv_dtypes
@pytest.mark.parametrize("length", [8192, 16400])
def test_contexts_of_many_thousands_equal_the_reference(length, kv_dtype):
    s = make_sequence(length, 3, 1, 64, seed=300)
    expected = expected_of(dataclasses.replace(s, q=s.q[-2:]), kv_dtype=kv_dtype)
    for block_size in (16, 64):
        cache = store([s], block_size, kv_dtype)
        (prefill,) = attend(cache, [(0, s.q, length)])
        assert_same_bits(prefill[-2:], expected)
        for i in (1, 2):
            (decode,) = attend(cache, [(0, s.q[length - i : length - i + 1], length - i + 1)])
            assert_same_bits(decode, expected[2 - i : 3 - i])


def test_the_kv_dtype_shows_in_the_bits():
    assert num_different(long_expected(0), long_expected(0, torch.bfloat16)) > long_expected(0).numel() // 2


def test_another_order_of_summation_shows_in_the_bits(monkeypatch):
    s = long_sequence()
    tail = s.q[-40:]
    (out,) = attend(store([s]), [(0, tail, LENGTH)])
    monkeypatch.setattr(reference, "KEY_CHUNK", 128)
    assert num_different(out, reference.attention(tail, s.k, s.v, SCALE)) > out.numel() // 4


def test_torch_attention_would_not_pass():
    s = long_sequence()
    k, v = (t.expand(-1, 3, -1).transpose(0, 1) for t in (s.k, s.v))
    sdpa = torch.nn.functional.scaled_dot_product_attention
    prefill = sdpa(s.q.transpose(0, 1), k, v, is_causal=True, scale=SCALE)
    last = range(LENGTH - 60, LENGTH)
    decode = [sdpa(s.q[i : i + 1].transpose(0, 1), k[:, : i + 1], v[:, : i + 1], scale=SCALE) for i in last]
    assert num_different(prefill[:, -60:], torch.cat(decode, 1)) > 0
    assert num_different(prefill.transpose(0, 1), long_expected(0)) > 0


def test_strides_do_not_show():
    """Queries, keys and values as they come out of one fused projection, and in layouts that need a copy."""
    s = make_sequence(45, 4, 2, 16, seed=7)
    expected = reference.attention(s.q, s.k, s.v, SCALE)
    fused = torch.cat([t.flatten(1) for t in (s.q, s.k, s.v)], 1)
    q, k, v = (t.unflatten(1, (-1, 16)) for t in fused.split([64, 32, 32], 1))
    odd = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    plan = PackedPlan([(0, 45, -1)])
    for queries, keys, values in ((q, k, v), odd):
        assert_same_bits(packed_attention(queries, keys, values, plan, SCALE), expected)
        (out,) = attend(store([Sequence(q=queries, k=keys, v=values)]), [(0, queries, 45)])
        assert_same_bits(out, expected)


# Packed batches


@both_kv_dtypes
@pytest.mark.parametrize("window", [0, 9])
@pytest.mark.parametrize("block_size", [16, 48])
def test_shared_prompts_equal_separate_sequences(block_size, window, kv_dtype):
    s = packed_rows()
    plan = PackedPlan(SEGMENTS, block_size, kv_dtype)
    out = packed_attention(s.q, s.k, s.v, plan, SCALE, window)
    for first, end, parent in SEGMENTS:
        prompt = range(*SEGMENTS[parent][:2]) if parent >= 0 else range(0)
        rows = [*prompt, *range(first, end)]
        lone_plan = PackedPlan([(0, len(rows), -1)], kv_dtype=kv_dtype)
        alone = packed_attention(s.q[rows], s.k[rows], s.v[rows], lone_plan, SCALE, window)
        assert_same_bits(out[first:end], alone[len(prompt) :])
    assert_same_bits(out, reference.packed_attention(s.q, s.k, s.v, plan, SCALE, window))


def test_packed_equals_paged_over_long_contexts():
    """Trainer and engine: a prompt of 300 with samples of 320, packed, against the engine's sequences."""
    s = long_sequence()
    other = make_sequence(320, 3, 1, 16, seed=77)
    q, k, v = (torch.cat([getattr(s, name), getattr(other, name)]) for name in "qkv")
    out = packed_attention(q, k, v, PackedPlan([(0, 300, -1), (300, 620, 0), (620, 940, 0)]), SCALE)
    assert_same_bits(out[:620], long_expected(0))
    second = Sequence(
        q=torch.cat([s.q[:300], other.q]), k=torch.cat([s.k[:300], other.k]), v=torch.cat([s.v[:300], other.v])
    )
    rows = [(0, second.q[i : i + 1], i + 1) for i in range(300, 620)]
    assert_same_bits(out[620:], torch.cat(attend(store([second]), rows)))


# Storage


@both_kv_dtypes
def test_store_writes_its_slots_only(kv_dtype):
    keys = torch.full((5, 2, 16, 32), -7.0, dtype=kv_dtype)
    values = torch.full((5, 2, 32, 16), -7.0, dtype=kv_dtype)
    k, v = spread(9, 2, 16, seed=60), spread(9, 2, 16, seed=61)
    rows, slots = torch.tensor([8, 0, 3]), torch.tensor([4 * 32 + 31, 5, 32])
    kv_store(k, v, keys, values, slots, rows)
    for row, slot in zip(rows.tolist(), slots.tolist()):
        assert_same_bits(keys[slot // 32, :, :, slot % 32].float(), reference.round_kv(k[row], kv_dtype))
        assert_same_bits(values[slot // 32, :, slot % 32].float(), reference.round_kv(v[row], kv_dtype))
        keys[slot // 32, :, :, slot % 32] = values[slot // 32, :, slot % 32] = -7.0
    assert (keys == -7.0).all()
    assert (values == -7.0).all()


def test_rounding_is_to_the_nearest_bfloat16_and_ties_go_to_even():
    words = torch.tensor(
        [0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x7F7F7FFF, 0x7F7F8000, 0x00008000, 0x00008001, 0x7F800001]
    )
    words = torch.cat([words, words - 2**31]).int()  # of either sign
    x = torch.cat([words.view(torch.float32), spread(4078, seed=63, low=-140, high=128)]).reshape(64, 1, 64)
    keys, values = torch.zeros(4, 1, 64, 16, dtype=torch.bfloat16), torch.zeros(4, 1, 16, 64, dtype=torch.bfloat16)
    kv_store(x, x, keys, values, torch.arange(64))
    stored = keys.transpose(2, 3).reshape(64, 1, 64)
    assert_same_bits(stored, values.reshape(64, 1, 64))
    is_nan = x.isnan()
    assert torch.equal(is_nan, stored.isnan())
    assert_same_bits(stored[~is_nan].float(), reference.round_kv(x, torch.bfloat16)[~is_nan])
    assert_same_bits(stored[~is_nan], x.bfloat16()[~is_nan])


@both_kv_dtypes
@pytest.mark.parametrize("num_threads", [1, 3])
def test_blocks_are_copied_pair_by_pair_in_every_plane(num_threads, kv_dtype):
    set_num_threads(num_threads)
    storage = spread(6, 8, 2, 16, seed=62).to(kv_dtype)
    expected = storage.clone()
    pairs = [(0, 5), (5, 6), (3, 0)]  # a later pair sees what an earlier one wrote
    for source, destination in pairs:
        expected[:, destination] = expected[:, source]
    copy_blocks(storage, pairs)
    assert_same_bits(storage, expected)
    copy_blocks(storage, [])
    assert_same_bits(storage, expected)


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="head_dim=24"):
        check_attention_shape(24, 16)
    with pytest.raises(ValueError, match="head_dim=272"):
        check_attention_shape(272, 16)
    with pytest.raises(ValueError, match="block_size=24"):
        check_attention_shape(64, 24)
    check_attention_shape(256, 48)
    with pytest.raises(ValueError, match="must begin at row 5"):
        PackedPlan([(0, 5, -1), (6, 7, -1)])
    with pytest.raises(ValueError, match="segment 3 has parent 0"):
        PackedPlan([(0, 5, -1), (5, 6, 0), (6, 7, -1), (7, 8, 0)])
    s = packed_rows()
    keys, values = torch.zeros(1, 2, 16, 16), torch.zeros(1, 2, 16, 16, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=r"torch.float32 and torch.bfloat16: both must be"):
        kv_store(s.k, s.v, keys, values, torch.arange(1))
    with pytest.raises(ValueError, match="float64"):
        packed_attention(s.q.double(), s.k.double(), s.v.double(), PackedPlan(SEGMENTS), SCALE)
