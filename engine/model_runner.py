"""ModelRunner: holds the weights and the KV storage of one device, and runs the plan of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.attention import PagedAttention
from engine.config import EngineConfig
from engine.input_batch import InputBatch, InputBuffers
from engine.model import NamedTensors, Transformer
from engine.model_config import ModelConfig
from engine.recorded_steps import RecordedSteps
from engine.sampler import Sampler
from engine.step_plan import ModelRunnerOutput, SchedulerOutput
from kernels.attention import check_attention_shape, copy_blocks
from kernels.storage import empty_storage


class ModelRunner:
    """Executes steps on the CPU. Storage of weights and KV is allocated once and never moves."""

    def __init__(self, config: ModelConfig, engine_config: EngineConfig, num_blocks: int) -> None:
        """engine_config: with max_model_len resolved."""
        block_size = engine_config.block_size
        check_attention_shape(config.head_dim, block_size)
        self.config = config
        self.model = Transformer(config, engine_config.profile_name)
        self.sampler = Sampler(self.model.lm_head)
        self.policy_version = 0
        self.input_buffers = InputBuffers(
            max_num_rows=engine_config.max_num_batched_tokens,
            max_num_seqs=engine_config.max_num_seqs,
            max_blocks_per_seq=-(-engine_config.max_model_len // block_size),
            block_size=block_size,
        )
        self._recorded = RecordedSteps()
        # Keys, then values: [2, L, P, K * H * S]. Unwritten pages of it cost no memory.
        kv_dtype = self.model.profile.kv_dtype
        width = config.num_kv_heads * config.head_dim * block_size
        self.kv_storage = empty_storage(2, config.num_layers, num_blocks, width, dtype=kv_dtype)
        shape = (config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, block_size)
        self.key_blocks = self.kv_storage[0].view(shape)
        self.value_blocks = self.kv_storage[1].view(*shape[:3], block_size, config.head_dim)

    def load_weights(
        self, named_tensors: NamedTensors, policy_version: int, digests: Mapping[str, bytes] | None = None
    ) -> bytes:
        """Replaces the weights in place, all or none; their checksum. See `Transformer.load_weights` for the errors."""
        checksum = self.model.load_weights(named_tensors, digests)
        self.policy_version = policy_version
        return checksum

    @torch.inference_mode()
    def execute_model(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        """Copies blocks, computes every scheduled row, and draws for those that caught up."""
        version = self.policy_version
        if plan.is_empty:
            return ModelRunnerOutput(token_ids=[], logprobs=[], policy_version=version)
        copy_blocks(self.kv_storage.flatten(0, 1), plan.block_copies)
        batch = self.input_buffers.pack(plan)
        hidden_TD = self._hidden_states(batch)
        token_ids, logprobs, details = self.sampler(hidden_TD, batch.sampling)
        return ModelRunnerOutput(token_ids=token_ids, logprobs=logprobs, policy_version=version, details=details)

    def _hidden_states(self, batch: InputBatch) -> torch.Tensor:
        def forward() -> torch.Tensor:
            return self.model(batch.input_ids, batch.positions, self._attention(batch))

        return self._recorded.run(batch.num_rows, forward) if batch.has_one_row_each else forward()

    def _attention(self, batch: InputBatch) -> PagedAttention:
        return PagedAttention(
            key_blocks=self.key_blocks,
            value_blocks=self.value_blocks,
            block_tables=batch.block_tables,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            slot_mapping=batch.slot_mapping,
            scale=self.config.head_dim**-0.5,
        )
