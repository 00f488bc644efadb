"""StandIn: a device whose steps take a given time, behind the model runner's interface.

The host's part is real: inputs are packed as for the model runner, tokens come back as lists. In place of computing it
sleeps. A token is a hash of whatever keys a draw, so a request's tokens are the same however it is scheduled.
"""

from __future__ import annotations

import itertools
import time
from typing import NamedTuple

import numpy as np

from engine import EngineConfig
from engine.input_batch import InputBatch, InputBuffers
from engine.sampling_batch import SamplingBatch
from engine.step_plan import ModelRunnerOutput, SchedulerOutput, later_step

NUM_TOKEN_IDS = 2**15
_MULTIPLIERS = np.array([0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35], np.uint64)[:, None]  # of seed, position, sample


class PreparedStep(NamedTuple):
    plan: SchedulerOutput
    inputs: InputBuffers
    batch: InputBatch
    token_ids: np.ndarray  # that the device will have drawn when it wakes


class StandIn:
    """See `engine.pipeline.Runner`. Its steps may be prepared while another runs."""

    def __init__(self, step_seconds: float, config: EngineConfig, token_seconds: float = 0.0) -> None:
        """A step takes step_seconds and token_seconds for each of its tokens. config: max_model_len is a number."""
        assert config.max_model_len is not None, "max_model_len must be given"
        self.step_seconds, self.token_seconds = step_seconds, token_seconds
        self.slept_seconds = 0.0
        sizes = {
            "max_num_rows": config.max_num_batched_tokens,
            "max_num_seqs": config.max_num_seqs,
            "max_blocks_per_seq": -(-config.max_model_len // config.block_size),
            "block_size": config.block_size,
        }
        self._next_inputs = itertools.cycle([InputBuffers(**sizes), InputBuffers(**sizes)])
        self._drawn_token_ids: list[int] = []

    def prepare(self, plan: SchedulerOutput) -> PreparedStep:
        inputs = next(self._next_inputs)
        batch = inputs.pack(plan)
        return PreparedStep(plan, inputs, batch, _tokens(batch.sampling))

    def execute(self, prepared: PreparedStep) -> ModelRunnerOutput:
        """As `ModelRunner.execute` does: pending tokens are filled in, later steps of a cycle go on from their own."""
        plan, inputs, batch, drawn_ids = prepared
        inputs.load(batch, self._drawn_token_ids)
        token_ids = self._draw(drawn_ids, plan.num_scheduled_tokens)
        all_ids, drawn, places = token_ids.copy(), token_ids.copy(), list(range(len(token_ids)))
        for number in range(1, plan.num_steps):
            plan = later_step(plan, number)
            places = [places[entry.source] for entry in plan.scheduled]
            drawn_ids = _tokens(inputs.load(inputs.advance(plan), token_ids).sampling)
            token_ids = self._draw(drawn_ids, plan.num_scheduled_tokens)
            all_ids += token_ids
            for place, token_id in zip(places, token_ids, strict=True):
                drawn[place] = token_id
        self._drawn_token_ids = drawn
        return ModelRunnerOutput(token_ids=all_ids, logprobs=[0.0] * len(all_ids), policy_version=0)

    def _draw(self, token_ids: np.ndarray, num_tokens: int) -> list[int]:
        """One step of the device."""
        start = time.perf_counter()
        time.sleep(self.step_seconds + num_tokens * self.token_seconds)
        self.slept_seconds += time.perf_counter() - start
        return token_ids.tolist()


def _tokens(sampling: SamplingBatch) -> np.ndarray:
    keys = sampling.draws[1:4].numpy().view(np.uint64) * _MULTIPLIERS
    mixed = keys[0] ^ keys[1] ^ keys[2]
    return (mixed ^ mixed >> np.uint64(15)) % np.uint64(NUM_TOKEN_IDS)
