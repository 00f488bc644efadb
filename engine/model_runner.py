"""ModelRunner: holds the weights and the KV storage of one device, and runs the plan of a step."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from engine.sampler import Sampler, SamplerOutput
from engine.step_plan import ModelRunnerOutput, SchedulerOutput, later_step
from engine.timing import StepClock
from kernels.profiles import GPU_PROFILES
from kernels.recording import Arena


@dataclass(frozen=True, slots=True, kw_only=True)
class _Lane:
    """Buffers for the inputs of a step, and what repeats steps that read them."""

    inputs: InputBuffers | DeviceInputs
    steps: RecordedSteps | CapturedSteps | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedStep:
    """A plan with its inputs on the host; good until the step after the next is prepared."""

    plan: SchedulerOutput
    lane: _Lane
    batch: InputBatch


class ModelRunner:
    """Executes steps. Storage of weights and KV is allocated once and never moves.

    A step may be prepared while the one before is executed, on another thread.
    """

    def __init__(
        self,
        config: ModelConfig,
        engine_config: EngineConfig,
        num_blocks: int,
        ops: Ops,
        clock: StepClock | None = None,
    ) -> None:
        """engine_config: with max_model_len resolved."""
        block_size = engine_config.block_size
        self.config, self.ops, self.clock = config, ops, clock or StepClock()
        self.model = Transformer(config, ops=ops)
        self.sampler = Sampler(self.model.lm_head)
        self.policy_version = 0
        self._lanes = _lanes(engine_config, ops)
        self._next_lanes = itertools.cycle(self._lanes)
        self._drawn_token_ids: Sequence[int] = ()  # the last ones, in order of the samples of the last plan
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

    @property
    def steps(self) -> RecordedSteps | CapturedSteps | None:
        """What runs decode steps again without Python; None where every step is computed op by op."""
        return self._lanes[0].steps

    def prepare(self, plan: SchedulerOutput) -> PreparedStep:
        """The host's part of a non-empty plan, for which the step before need not have ended."""
        lane = next(self._next_lanes)
        return PreparedStep(plan=plan, lane=lane, batch=lane.inputs.pack(plan))

    @torch.inference_mode()
    def execute(self, prepared: PreparedStep) -> ModelRunnerOutput:
        """Copies blocks, computes every scheduled row, and draws for those that caught up: once for each step."""
        version, plan, lane = self.policy_version, prepared.plan, prepared.lane
        self.ops.copy_blocks(self.kv_storage, plan.block_copies)
        outputs = [self._execute_batch(prepared.batch, lane, self._drawn_token_ids)]
        drawn, places = list(outputs[0].token_ids), list(range(len(outputs[0].token_ids)))
        for number in range(1, plan.num_steps):
            plan = later_step(plan, number)
            places = [places[entry.source] for entry in plan.scheduled]
            outputs.append(self._execute_batch(lane.inputs.advance(plan), lane, outputs[-1].token_ids))
            for place, token_id in zip(places, outputs[-1].token_ids, strict=True):
                drawn[place] = token_id
        self._drawn_token_ids = drawn
        return _joined(outputs, version)

    def _execute_batch(self, batch: InputBatch, lane: _Lane, drawn_token_ids: Sequence[int]) -> SamplerOutput:
        """drawn_token_ids: by the samples of the step before, whom pending tokens are taken from."""
        batch = lane.inputs.load(batch, drawn_token_ids)
        hidden_TD = self._hidden_states(batch, lane.steps)
        with self.clock.part("sample"):
            return self.sampler(hidden_TD, batch.sampling, batch.prompt_rows)

    def _hidden_states(self, batch: InputBatch, steps: RecordedSteps | CapturedSteps | None) -> torch.Tensor:
        def forward() -> torch.Tensor:
            return self.model(batch.input_ids, batch.positions, self._attention(batch))

        if steps is None or not batch.has_one_row_each:
            return forward()
        return steps.run(batch.num_rows, forward)

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


def _lanes(config: EngineConfig, ops: Ops) -> list[_Lane]:
    """One, or two used in turn where a step is prepared while another runs."""
    sizes = {
        "max_num_rows": config.max_num_batched_tokens,
        "max_num_seqs": config.max_num_seqs,
        "max_blocks_per_seq": -(-config.max_model_len // config.block_size),
        "block_size": config.block_size,
    }
    num_lanes = 2 if config.is_async else 1
    if not _is_gpu(ops):
        arena = Arena()
        repeated = (None if config.enforce_eager else RecordedSteps(arena) for _ in range(num_lanes))
        return [_Lane(inputs=InputBuffers(**sizes), steps=steps) for steps in repeated]
    inputs = DeviceInputs(ops.device, **sizes)
    steps = CapturedSteps() if ops.device.type == "cuda" and not config.enforce_eager else None
    return [_Lane(inputs=one, steps=steps) for one in (inputs, inputs.twin())[:num_lanes]]


def _joined(outputs: Sequence[SamplerOutput], policy_version: int) -> ModelRunnerOutput:
    token_ids, logprobs, details, prompt_logprobs = outputs[0]
    for later in outputs[1:]:
        token_ids, logprobs = token_ids + later.token_ids, logprobs + later.logprobs
        if details is not None:
            details = details + (later.details or [None] * len(later.token_ids))
    return ModelRunnerOutput(
        token_ids=token_ids, logprobs=logprobs, policy_version=policy_version, details=details,
        prompt_logprobs=prompt_logprobs,
    )  # fmt: skip


def _is_gpu(ops: Ops) -> bool:
    """Whether the kernels are the GPU's, though the interpreter may run them."""
    return ops.profile.name in GPU_PROFILES
