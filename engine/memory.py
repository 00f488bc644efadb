"""Memory: how many KV blocks an engine gets, from what was asked for and what the machine has."""

from __future__ import annotations

import os

import torch

from engine.config import EngineConfig
from engine.model_config import ModelConfig
from kernels.profiles import get_profile

DEFAULT_KV_CACHE_BYTES = 4 * 2**30
MAX_MEMORY_SHARE = 0.25  # of the machine's memory, where nothing was asked for: several engines may share it


def block_bytes(model_config: ModelConfig, block_size: int, kv_dtype: torch.dtype) -> int:
    """Bytes of one KV block: keys and values of block_size tokens in all layers."""
    width = model_config.num_kv_heads * model_config.head_dim
    return 2 * model_config.num_layers * width * block_size * kv_dtype.itemsize


def resolve_num_blocks(config: EngineConfig, model_config: ModelConfig, max_model_len: int) -> int:
    """Blocks of the KV pool: num_blocks, or what kv_cache_memory_bytes holds, or by default as many as max_num_seqs
    sequences of max_model_len could fill, up to 4 GiB and a quarter of the machine's memory.

    Raises ValueError where the memory asked for holds not one block.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    size = block_bytes(model_config, config.block_size, get_profile(config.profile_name).kv_dtype)
    if config.kv_cache_memory_bytes is not None:
        if config.kv_cache_memory_bytes < size:
            raise ValueError(
                f"kv_cache_memory_bytes={config.kv_cache_memory_bytes} holds no block: one of {config.block_size} "
                f"tokens takes {size} bytes"
            )
        return config.kv_cache_memory_bytes // size
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(1, min(most, min(DEFAULT_KV_CACHE_BYTES, int(memory * MAX_MEMORY_SHARE)) // size))
