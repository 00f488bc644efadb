"""Admission: refuses a request that could never be served, however long it waited, with the numbers that say why."""

from __future__ import annotations

from engine.block_pool import BlockPool
from engine.request import Request


def check_can_be_served(leader: Request, pool: BlockPool, *, max_model_len: int, max_num_seqs: int) -> None:
    """ValueError for a prompt that is empty or too long, more samples than seats, a stop that cannot be looked for, or
    more tokens than the whole KV pool holds.
    """
    name, num_prompt_tokens, params = leader.request_id, leader.num_prompt_tokens, leader.params
    if num_prompt_tokens == 0:
        raise ValueError(f"request {name!r} has an empty prompt; it needs at least one token")
    if num_prompt_tokens >= max_model_len:
        raise ValueError(
            f"request {name!r} has a prompt of {num_prompt_tokens} tokens, which leaves no room for a completion "
            f"in max_model_len={max_model_len}; shorten the prompt"
        )
    if params.n > max_num_seqs:
        raise ValueError(
            f"request {name!r} has n={params.n} samples, more than max_num_seqs={max_num_seqs}; "
            "ask for fewer samples or raise max_num_seqs"
        )
    if params.stop and leader.detokenizer is None:
        raise ValueError(
            f"request {name!r} has stop strings {list(params.stop)}, but there is no tokenizer to find them with; "
            "use stop_token_ids"
        )
    _check_fits_pool(leader, pool, max_model_len)


def _check_fits_pool(leader: Request, pool: BlockPool, max_model_len: int) -> None:
    # The last token is drawn but never stored.
    num_tokens = min(leader.num_prompt_tokens + leader.params.max_tokens, max_model_len) - 1
    num_blocks = -(-num_tokens // pool.block_size)
    if num_blocks > pool.num_blocks:
        raise ValueError(
            f"request {leader.request_id!r} can never fit: {leader.num_prompt_tokens} prompt tokens and "
            f"max_tokens={leader.params.max_tokens} need {num_blocks} blocks of {pool.block_size} tokens, and the "
            f"pool has num_blocks={pool.num_blocks}; lower max_tokens or give the KV cache more memory"
        )
