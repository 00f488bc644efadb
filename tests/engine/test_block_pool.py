"""The block pool: references, the order of the free queue, and a prefix cache that never lies."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from engine.block_pool import BlockPool, hash_block, root_hash

ROOT = root_hash(b"weights")


def block_hash(*token_ids: int) -> bytes:
    return hash_block(ROOT, token_ids)


def test_blocks_are_handed_out_once_and_come_back():
    pool = BlockPool(4, 2)
    first, second = pool.allocate(3), pool.allocate(1)
    assert sorted(first + second) == [0, 1, 2, 3]
    assert pool.num_free_blocks == 0
    assert pool.usage == 1.0
    pool.check_integrity([first, second])
    pool.free(first)
    assert pool.num_free_blocks == 3
    assert pool.usage == 0.25
    pool.check_integrity([second])


def test_asking_for_more_blocks_than_are_free_is_a_bug():
    pool = BlockPool(2, 2)
    with pytest.raises(AssertionError, match="3 blocks asked for, 2 free"):
        pool.allocate(3)


def test_freeing_a_block_twice_is_a_bug():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.free(table)
    with pytest.raises(AssertionError, match="once too often"):
        pool.free(table)


def test_a_shared_block_is_free_only_when_the_last_holder_lets_go():
    pool = BlockPool(2, 2)
    table = pool.allocate(2)
    pool.touch(table)
    assert [pool.ref_count(block_id) for block_id in table] == [2, 2]
    pool.free(table)
    assert pool.num_free_blocks == 0
    pool.check_integrity([table])
    pool.free(table)
    assert pool.num_free_blocks == 2
    pool.check_integrity([])


def test_the_tail_of_a_sequence_is_evicted_before_its_head():
    pool = BlockPool(3, 2)
    table = pool.allocate(3)
    for place, block_id in enumerate(table):
        pool.register(block_id, block_hash(place))
    pool.free(table)
    assert [pool.allocate(1)[0] for _ in range(3)] == table[::-1]


def test_the_least_recently_used_sequence_is_evicted_first():
    pool = BlockPool(4, 2)
    old, new = pool.allocate(2), pool.allocate(2)
    for place, block_id in enumerate(old + new):
        pool.register(block_id, block_hash(place))
    pool.free(old)
    pool.free(new)
    pool.touch(old)  # used again
    pool.free(old)
    assert pool.allocate(4) == new[::-1] + old[::-1]


def test_blocks_without_a_hash_are_reused_before_cached_ones():
    pool = BlockPool(4, 2)
    table = pool.allocate(4)
    pool.register(table[2], block_hash(2))
    pool.register(table[3], block_hash(3))
    pool.free(table)
    assert set(pool.allocate(2)) == set(table[:2])
    assert pool.num_evictions == 0
    assert pool.lookup(block_hash(3)) == table[3]


def test_a_free_block_can_be_hit_until_it_is_reused_and_never_after():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.register(table[0], block_hash(1, 2))
    pool.free(table)
    assert pool.lookup(block_hash(1, 2)) == table[0]
    others = pool.allocate(2)
    assert pool.lookup(block_hash(1, 2)) is None
    assert pool.num_evictions == 1
    pool.check_integrity([others])


def test_a_hit_leaves_the_free_queue_so_that_allocate_cannot_take_it():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.register(table[0], block_hash(1, 2))
    pool.free(table)
    pool.touch(table)
    assert pool.num_free_blocks == 1
    assert pool.allocate(1) != table
    assert pool.lookup(block_hash(1, 2)) == table[0]


def test_a_block_can_be_hit_while_it_is_in_use():
    pool = BlockPool(2, 2)
    table = pool.allocate(1)
    pool.register(table[0], block_hash(1, 2))
    pool.touch([pool.lookup(block_hash(1, 2))])
    assert pool.ref_count(table[0]) == 2


def test_a_second_block_of_the_same_contents_stays_private():
    pool = BlockPool(2, 2)
    first, second = pool.allocate(2)
    pool.register(first, block_hash(1, 2))
    pool.register(second, block_hash(1, 2))
    assert pool.lookup(block_hash(1, 2)) == first
    pool.free([first, second])
    pool.allocate(1)  # the private one
    assert pool.lookup(block_hash(1, 2)) == first


def test_nothing_is_registered_with_prefix_caching_off():
    pool = BlockPool(2, 2, enable_prefix_caching=False)
    table = pool.allocate(1)
    pool.register(table[0], block_hash(1, 2))
    assert pool.lookup(block_hash(1, 2)) is None
    pool.check_integrity([table])


def test_resetting_the_cache_forgets_hashes_and_keeps_references():
    pool = BlockPool(3, 2)
    table = pool.allocate(2)
    pool.register(table[0], block_hash(1, 2))
    pool.register(table[1], block_hash(3, 4))
    pool.free(table[1:])
    pool.reset_prefix_cache()
    assert pool.lookup(block_hash(1, 2)) is None
    assert pool.lookup(block_hash(3, 4)) is None
    pool.check_integrity([table[:1]])
    pool.register(table[0], block_hash(1, 2))
    assert pool.lookup(block_hash(1, 2)) == table[0]


def test_a_hash_depends_on_weights_salt_prefix_and_tokens():
    hashes = {
        hash_block(root, tokens)
        for root in (ROOT, root_hash(b"other weights"), root_hash(b"weights", "salt"), hash_block(ROOT, [9, 9]))
        for tokens in ([1, 2], [2, 1], [1, 2, 0], [1, 2**31 - 1])
    }
    assert len(hashes) == 16
    assert all(len(h) >= 16 for h in hashes)
    assert hash_block(ROOT, [1, 2]) == hash_block(root_hash(b"weights"), (1, 2))


def test_checksum_and_salt_do_not_run_into_each_other():
    assert root_hash(b"ab", "c") != root_hash(b"a", "bc")
    assert root_hash(b"abc") != root_hash(b"ab", "c")


@pytest.mark.parametrize("tables", [[[0]], [[0], [0], [1]], [[0, 1], [1]], [[7]]])
def test_check_integrity_notices_tables_that_do_not_match(tables):
    pool = BlockPool(3, 2)
    pool.allocate(2)
    with pytest.raises(AssertionError):
        pool.check_integrity(tables)


@pytest.mark.parametrize(("num_blocks", "block_size", "name"), [(0, 4, "num_blocks=0"), (4, 0, "block_size=0")])
def test_a_pool_of_nothing_is_refused(num_blocks, block_size, name):
    with pytest.raises(ValueError, match=name):
        BlockPool(num_blocks, block_size)


class BlockPoolMachine(RuleBasedStateMachine):
    """Random sharing, against a model that knows what every block holds."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(6, 2)
        self.tables: list[list[int]] = []
        self.contents: dict[int, bytes] = {}  # of registered blocks, until they are handed out again

    @rule(num=st.integers(1, 4))
    def allocate(self, num):
        if num > self.pool.num_free_blocks:
            return
        free_before = [b for b in range(6) if self.pool.ref_count(b) == 0]
        table = self.pool.allocate(num)
        assert len(set(table)) == num
        assert set(table) <= set(free_before)
        for block_id in table:
            self.contents.pop(block_id, None)
        self.tables.append(table)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def fork(self, data):
        table = data.draw(st.sampled_from(self.tables))
        self.pool.touch(table)
        self.tables.append(list(table))

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def free(self, data):
        place = data.draw(st.integers(0, len(self.tables) - 1))
        self.pool.free(self.tables.pop(place))

    @precondition(lambda self: self.tables)
    @rule(data=st.data(), token_id=st.integers(0, 7))
    def register(self, data, token_id):
        block_id = data.draw(st.sampled_from(data.draw(st.sampled_from(self.tables))))
        if block_id in self.contents:
            return
        self.pool.register(block_id, block_hash(token_id))
        if block_hash(token_id) not in self.contents.values():
            self.contents[block_id] = block_hash(token_id)

    @rule(token_id=st.integers(0, 7))
    def hit(self, token_id):
        block_id = self.pool.lookup(block_hash(token_id))
        known = [b for b, h in self.contents.items() if h == block_hash(token_id)]
        assert ([] if block_id is None else [block_id]) == known
        if block_id is not None:
            self.pool.touch([block_id])
            self.tables.append([block_id])

    @rule()
    def reset(self):
        self.pool.reset_prefix_cache()
        self.contents.clear()

    @invariant()
    def everything_adds_up(self):
        self.pool.check_integrity(self.tables)

    def teardown(self):
        for table in self.tables:
            self.pool.free(table)
        self.pool.check_integrity([])
        assert self.pool.num_free_blocks == 6


TestBlockPoolMachine = BlockPoolMachine.TestCase
TestBlockPoolMachine.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
