"""Block pool: who holds which block of the KV cache, which are free, and which free ones can still be reused."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Iterable, Sequence
from hashlib import blake2b

# 128 bits: two different prefixes will not meet in one hash, so a hit needs no comparison of tokens.
HASH_BYTES = 16


def root_hash(weights_checksum: bytes, salt: str = "") -> bytes:
    """What the chain of a sequence's block hashes starts from: keys and values of other weights can never match."""
    sized_checksum = len(weights_checksum).to_bytes(8, "little") + weights_checksum
    return blake2b(sized_checksum + salt.encode(), digest_size=HASH_BYTES, person=b"root").digest()


def hash_block(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Hash of a full block: its tokens (as int32) and, through the parent, all that comes before them."""
    return blake2b(parent + array("i", token_ids).tobytes(), digest_size=HASH_BYTES, person=b"block").digest()


class BlockPool:
    """Reference-counted blocks 0..num_blocks-1 of `block_size` tokens each.

    A block with no reference is free. A free block that was registered under a hash keeps its contents until it is
    handed out again, so a later request with the same prefix can take it back. Free blocks are handed out from the
    head of one queue: first those without a hash, then the least recently used.
    """

    def __init__(self, num_blocks: int, block_size: int, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1:
            raise ValueError(f"num_blocks={num_blocks} must be at least 1; give the KV cache more memory")
        if block_size < 1:
            raise ValueError(f"block_size={block_size} must be at least 1")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self.num_evictions = 0
        self._ref_counts = [0] * num_blocks
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(num_blocks))
        self._hash_of_block: list[bytes | None] = [None] * num_blocks
        self._block_of_hash: dict[bytes, int] = {}

    @property
    def num_free_blocks(self) -> int:
        return len(self._free)

    @property
    def usage(self) -> float:
        """Share of the blocks in use, 0..1."""
        return 1.0 - len(self._free) / self.num_blocks

    def ref_count(self, block_id: int) -> int:
        return self._ref_counts[block_id]

    def allocate(self, num: int) -> list[int]:
        """Takes `num` blocks from the head of the free queue; whatever hash they had is forgotten only now."""
        assert num <= len(self._free), f"{num} blocks asked for, {len(self._free)} free"
        block_ids = [self._free.popitem(last=False)[0] for _ in range(num)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
            if self._forget_hash(block_id):
                self.num_evictions += 1
        return block_ids

    def touch(self, block_ids: Iterable[int]) -> None:
        """Adds a reference to each block; free ones leave the queue."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                del self._free[block_id]
            self._ref_counts[block_id] += 1

    def free(self, block_ids: Sequence[int]) -> None:
        """Drops a reference of each block of a sequence; the tail is queued first and so reused first.

        A prefix is only of use from its start, so of one sequence the tail goes before the head.
        """
        for block_id in reversed(block_ids):
            ref_count = self._ref_counts[block_id] - 1
            assert ref_count >= 0, f"block {block_id} was freed once too often"
            self._ref_counts[block_id] = ref_count
            if ref_count == 0:
                self._free[block_id] = None
                if self._hash_of_block[block_id] is None:
                    self._free.move_to_end(block_id, last=False)

    def register(self, block_id: int, block_hash: bytes) -> None:
        """Lets later requests find a full block in use; a second block of the same contents stays private."""
        if not self.enable_prefix_caching or block_hash in self._block_of_hash:
            return
        assert self._ref_counts[block_id] > 0, f"block {block_id} is free and cannot be registered"
        assert self._hash_of_block[block_id] is None, f"block {block_id} is registered already"
        self._hash_of_block[block_id] = block_hash
        self._block_of_hash[block_hash] = block_id

    def lookup(self, block_hash: bytes) -> int | None:
        return self._block_of_hash.get(block_hash)

    def reset_prefix_cache(self) -> None:
        """Forgets every hash, those of blocks in use too; references stay as they are."""
        self._hash_of_block = [None] * self.num_blocks
        self._block_of_hash = {}

    def _forget_hash(self, block_id: int) -> bool:
        block_hash = self._hash_of_block[block_id]
        if block_hash is None:
            return False
        self._hash_of_block[block_id] = None
        del self._block_of_hash[block_hash]
        return True

    def check_integrity(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Asserts that references equal the tables' entries, that the rest is free, and that the hashes add up."""
        held = Counter(block_id for table in block_tables for block_id in table)
        assert all(0 <= block_id < self.num_blocks for block_id in held), "a table names a block that does not exist"
        for block_id, ref_count in enumerate(self._ref_counts):
            assert ref_count == held[block_id], f"block {block_id}: ref_count {ref_count}, in {held[block_id]} tables"
            assert (ref_count == 0) == (block_id in self._free), f"block {block_id}: ref_count {ref_count}, wrong queue"
        assert len(self._free) == self._ref_counts.count(0), "the free queue holds something that is no block"
        registered = {h: block_id for block_id, h in enumerate(self._hash_of_block) if h is not None}
        assert registered == self._block_of_hash, "the two directions of the hash map differ"
        assert self.enable_prefix_caching or not registered, "a block is registered with prefix caching off"
