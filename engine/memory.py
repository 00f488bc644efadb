"""Memory: how many KV blocks an engine gets, from what was asked for and what the machine has."""

from __future__ import annotations

import os

import torch

from engine.config import EngineConfig
from engine.model_config import ModelConfig
from engine.ops import Ops

DEFAULT_KV_CACHE_BYTES = 4 * 2**30
MAX_MEMORY_SHARE = 0.25  # of the machine's memory, where nothing was asked for: several engines may share it
MAX_FREE_SHARE = 0.9  # of what is free on a GPU, for weights, activations and KV blocks together
DEVICE_WORKSPACE_BYTES = 2**30  # for partial results of attention, sums of the vocabulary, captured graphs


def block_bytes(model_config: ModelConfig, block_size: int, kv_dtype: torch.dtype) -> int:
    """Bytes of one KV block: keys and values of block_size tokens in all layers."""
    width = model_config.num_kv_heads * model_config.head_dim
    return 2 * model_config.num_layers * width * block_size * kv_dtype.itemsize


def weight_bytes(model_config: ModelConfig, dtype: torch.dtype) -> int:
    """Bytes of a model's matrices; vectors are too small to count."""
    D, F, H = model_config.hidden_size, model_config.intermediate_size, model_config.head_dim
    layer = D * H * 2 * (model_config.num_heads + model_config.num_kv_heads) + 3 * D * F
    num_heads = 1 if model_config.tie_word_embeddings else 2
    return dtype.itemsize * (model_config.num_layers * layer + num_heads * model_config.vocab_size * D)


def resolve_num_blocks(config: EngineConfig, model_config: ModelConfig, max_model_len: int, ops: Ops) -> int:
    """Blocks of the KV pool: num_blocks, or what kv_cache_memory_bytes holds, or by default as many as max_num_seqs
    sequences of max_model_len could fill, up to 4 GiB and a quarter of the machine's memory on a CPU, and to what
    weights and activations will leave, on a GPU where the weights are not yet, of its free memory and of the engine's
    share of all.

    Raises ValueError where the memory asked for, or left, holds not one block.
    """
    if config.num_blocks is not None:
        return config.num_blocks
    size = block_bytes(model_config, config.block_size, ops.profile.kv_dtype)
    if config.kv_cache_memory_bytes is not None:
        if config.kv_cache_memory_bytes < size:
            raise ValueError(
                f"kv_cache_memory_bytes={config.kv_cache_memory_bytes} holds no block: one of {config.block_size} "
                f"tokens takes {size} bytes"
            )
        return config.kv_cache_memory_bytes // size
    most = config.max_num_seqs * -(-max_model_len // config.block_size)
    free = available_bytes(ops.device)
    if ops.device.type != "cuda":
        return max(1, min(most, min(DEFAULT_KV_CACHE_BYTES, int(free * MAX_MEMORY_SHARE)) // size))
    usable = usable_device_bytes(free, torch.cuda.mem_get_info(ops.device)[1], config.gpu_memory_utilization)
    left = device_bytes_left(usable, config.max_num_batched_tokens, model_config, ops.profile.weight_dtype)
    if left < size:
        raise ValueError(
            f"the GPU has {free / 2**30:.1f} GiB free, and of the {usable / 2**30:.1f} GiB that an engine may take "
            f"with gpu_memory_utilization={config.gpu_memory_utilization:g} weights and activations leave none for "
            "keys and values: end what else uses it, raise that share, or lower "
            f"max_num_batched_tokens={config.max_num_batched_tokens}"
        )
    return min(most, left // size)


def available_bytes(device: torch.device) -> int:
    """The machine's memory, or what is free on a GPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def usable_device_bytes(free: int, total: int, utilization: float) -> int:
    """Bytes that an engine may take of a GPU: of what is free, and no more than its share of all."""
    return min(int(free * MAX_FREE_SHARE), int(total * utilization))


def device_bytes_left(usable: int, max_num_batched_tokens: int, model_config: ModelConfig, dtype: torch.dtype) -> int:
    """Of `usable` bytes on a GPU, those that KV blocks may take; may be negative."""
    row = 40 * model_config.hidden_size + 4 * dtype.itemsize * model_config.intermediate_size
    taken = weight_bytes(model_config, dtype) + max_num_batched_tokens * row + DEVICE_WORKSPACE_BYTES
    return usable - taken
