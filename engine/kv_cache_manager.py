"""KVCacheManager: gives requests their blocks - found in the prefix cache, new, or copied before they are written."""

from __future__ import annotations

from engine.block_pool import BlockPool, hash_block, root_hash
from engine.request import Request


class KVCacheManager:
    """Keeps each request's `block_ids` in step with what it computes; the scheduler says who goes without."""

    def __init__(self, block_pool: BlockPool, weights_checksum: bytes) -> None:
        self.block_pool = block_pool
        self.weights_checksum = weights_checksum

    def num_blocks(self, num_tokens: int) -> int:
        """Blocks that hold so many tokens."""
        return -(-num_tokens // self.block_pool.block_size)

    def find_cached_blocks(self, request: Request) -> list[int]:
        """Blocks that hold the request's first tokens; the last token is always computed, as it is drawn from.

        There are none for a request that reports on its prompt: all rows of it must be computed.
        """
        pool = self.block_pool
        block_ids: list[int] = []
        if request.reports_on_prompt or not pool.enable_prefix_caching:
            return block_ids
        for index in range((len(request.token_ids) - 1) // pool.block_size):
            block_id = pool.lookup(self._block_hash(request, index))
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def adopt(self, request: Request, cached_block_ids: list[int]) -> None:
        """Starts a request on blocks that `find_cached_blocks` found for it."""
        self.block_pool.touch(cached_block_ids)
        request.block_ids = cached_block_ids
        request.num_computed_tokens = request.num_cached_tokens = len(cached_block_ids) * self.block_pool.block_size

    def has_blocks(self, request: Request, end: int) -> bool:
        """Whether the request's tokens up to `end` go into blocks that it has, and no one else: the common case."""
        block_ids, size = request.block_ids, self.block_pool.block_size
        if end > len(block_ids) * size:
            return False
        return not request.num_computed_tokens % size or self.block_pool.ref_count(block_ids[-1]) == 1

    def has_room(self, request: Request, end: int) -> bool:
        """Whether there are blocks for the request's tokens up to `end`, one to copy a shared block into included."""
        num_missing_blocks = self.num_blocks(end) - len(request.block_ids) + self._writes_shared_block(request)
        return num_missing_blocks <= self.block_pool.num_free_blocks

    def extend(self, request: Request, end: int) -> list[tuple[int, int]]:
        """Gives the request blocks for its tokens up to `end`; returns the (source, destination) copies this takes.

        Copy on write: the source is left to the others, and whoever may write it this step does so after the copy.
        """
        pool, copies = self.block_pool, []
        if self._writes_shared_block(request):
            source = request.block_ids[-1]
            [destination] = pool.allocate(1)
            request.block_ids[-1] = destination
            pool.free([source])
            copies.append((source, destination))
        num_missing_blocks = self.num_blocks(end) - len(request.block_ids)
        if num_missing_blocks > 0:
            request.block_ids += pool.allocate(num_missing_blocks)
        return copies

    def register_full_blocks(self, request: Request, start: int, end: int) -> None:
        """Registers the blocks that computing positions [start, end) fills; others may hit them in the same step."""
        pool = self.block_pool
        first, last = start // pool.block_size, end // pool.block_size
        if first == last or request.has_mixed_kv or not pool.enable_prefix_caching:
            return
        for index in range(first, last):
            pool.register(request.block_ids[index], self._block_hash(request, index))

    def share(self, leader: Request, sibling: Request) -> None:
        """Lets a sibling start where the leader is, on the same blocks."""
        self.block_pool.touch(leader.block_ids)
        sibling.block_ids = leader.block_ids.copy()
        sibling.block_hashes = leader.block_hashes.copy()
        sibling.num_computed_tokens = sibling.num_cached_tokens = leader.num_computed_tokens
        sibling.has_mixed_kv = leader.has_mixed_kv

    def release(self, request: Request) -> None:
        """Takes all blocks back; the request's tokens stay."""
        self.block_pool.free(request.block_ids)
        request.block_ids = []
        request.num_computed_tokens = 0
        request.has_mixed_kv = False

    def _writes_shared_block(self, request: Request) -> bool:
        """Whether its next token goes into a block that others hold too."""
        is_inside_block = request.num_computed_tokens % self.block_pool.block_size > 0
        return is_inside_block and self.block_pool.ref_count(request.block_ids[-1]) > 1

    def _block_hash(self, request: Request, index: int) -> bytes:
        hashes = request.block_hashes
        block_size = self.block_pool.block_size
        while len(hashes) <= index:
            parent = hashes[-1] if hashes else root_hash(self.weights_checksum, request.cache_salt)
            start = len(hashes) * block_size
            hashes.append(hash_block(parent, request.token_ids[start : start + block_size]))
        return hashes[index]
