"""ModelRunner: holds the weights and the KV storage of one device, and runs the plan of a step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from engine.attention import PagedAttention
from engine.captured_steps import CapturedSteps
from engine.config import EngineConfig
from engine.device_inputs import DeviceInputs
from engine.input_batch import InputBatch, InputBuffers
from engine.model import NamedTensors, Transformer
from engine.model_config import ModelConfig
from engine.ops import Ops
from engine.recorded_steps import RecordedSteps
from engine.sampler import Sampler
from engine.step_plan import ModelRunnerOutput, SchedulerOutput
from kernels.profiles import GPU_PROFILES


class ModelRunner:
    """Executes steps. Storage of weights and KV is allocated once and never moves."""

    def __init__(self, config: ModelConfig, engine_config: EngineConfig, num_blocks: int, ops: Ops) -> None:
        """engine_config: with max_model_len resolved."""
        block_size = engine_config.block_size
        self.config, self.ops = config, ops
        self.model = Transformer(config, ops=ops)
        self.sampler = Sampler(self.model.lm_head)
        self.policy_version = 0
        self.input_buffers = _input_buffers(engine_config, ops)
        self.steps = _repeated_steps(engine_config, ops)
        self.kv_storage, self.key_blocks, self.value_blocks = ops.new_blocks(
            config.num_layers, num_blocks, config.num_kv_heads, config.head_dim, block_size
        )

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
        batch = self.input_buffers.pack(plan)
        self.ops.copy_blocks(self.kv_storage, plan.block_copies)
        hidden_TD = self._hidden_states(batch)
        token_ids, logprobs, details = self.sampler(hidden_TD, batch.sampling)
        return ModelRunnerOutput(token_ids=token_ids, logprobs=logprobs, policy_version=version, details=details)

    def _hidden_states(self, batch: InputBatch) -> torch.Tensor:
        def forward() -> torch.Tensor:
            return self.model(batch.input_ids, batch.positions, self._attention(batch))

        if self.steps is None or not batch.has_one_row_each:
            return forward()
        return self.steps.run(batch.num_rows, forward)

    def _attention(self, batch: InputBatch) -> PagedAttention:
        return PagedAttention(
            ops=self.ops,
            key_blocks=self.key_blocks,
            value_blocks=self.value_blocks,
            block_tables=batch.block_tables,
            cu_seqlens_q=batch.cu_seqlens_q,
            seq_lens=batch.seq_lens,
            slot_mapping=batch.slot_mapping,
            scale=self.config.head_dim**-0.5,
        )


def _input_buffers(config: EngineConfig, ops: Ops) -> InputBuffers | DeviceInputs:
    sizes = {
        "max_num_rows": config.max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_blocks_per_seq": -(-config.max_model_len // config.block_size),
        "block_size": config.block_size,
    }
    return DeviceInputs(ops.device, **sizes) if _is_gpu(ops) else InputBuffers(**sizes)


def _repeated_steps(config: EngineConfig, ops: Ops) -> RecordedSteps | CapturedSteps | None:
    """What runs a decode step again without Python; None where every step is computed op by op."""
    if config.enforce_eager:
        return None
    if _is_gpu(ops):
        return CapturedSteps() if ops.device.type == "cuda" else None
    return RecordedSteps()


def _is_gpu(ops: Ops) -> bool:
    """Whether the kernels are the GPU's, though the interpreter may run them."""
    return ops.profile.name in GPU_PROFILES
