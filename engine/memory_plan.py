"""MemoryPlan: what an engine will take and what will fit, without building it."""

from __future__ import annotations

from dataclasses import dataclass

from engine.checkpoint import read_model_config
from engine.config import EngineConfig
from engine.memory import available_bytes, block_bytes, resolve_num_blocks, weight_bytes
from engine.ops import make_ops


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Sizes in bytes, lengths in tokens."""

    profile: str  # of the numbers
    device: str  # "cpu" or "cuda"
    weight_bytes: int  # of the matrices, as the engine packs them
    block_bytes: int  # of one KV block in all layers
    block_size: int
    num_blocks: int
    max_model_len: int
    max_num_seqs: int
    available_bytes: int  # of the machine, or free on the GPU now

    @classmethod
    def from_config(cls, config: EngineConfig) -> MemoryPlan:
        """Of a model directory the configuration alone is read; a .gguf or hub id is made one first, as for an engine.

        Raises ValueError as LLMEngine does, for a model or sizes that cannot work.
        """
        ops = make_ops(config.numerics, config.device)
        model_config = read_model_config(config.model)
        max_model_len = config.resolve_max_model_len(model_config)
        return cls(
            profile=ops.profile.name,
            device=ops.device.type,
            weight_bytes=weight_bytes(model_config, ops.profile.weight_dtype),
            block_bytes=block_bytes(model_config, config.block_size, ops.profile.kv_dtype),
            block_size=config.block_size,
            num_blocks=resolve_num_blocks(config, model_config, max_model_len, ops),
            max_model_len=max_model_len,
            max_num_seqs=config.max_num_seqs,
            available_bytes=available_bytes(ops.device),
        )

    @property
    def kv_cache_bytes(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens whose keys and values fit."""
        return self.num_blocks * self.block_size

    def num_requests(self, num_tokens: int) -> int:
        """Requests of so many tokens, nothing shared, that fit at once."""
        return min(self.max_num_seqs, self.num_blocks // self._num_blocks(num_tokens))

    def num_groups(self, prompt_length: int, completion_length: int, group_size: int) -> int:
        """Groups of samples, each sharing its prompt's full blocks, that fit at once."""
        num_shared = prompt_length // self.block_size
        num_own = self._num_blocks(prompt_length + completion_length) - num_shared
        return min(self.max_num_seqs // group_size, self.num_blocks // (num_shared + group_size * num_own))

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)
