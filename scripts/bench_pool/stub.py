"""Stub: an engine that sleeps in place of computing, so that what is left of a pool is the service itself."""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from engine import Completion, EngineConfig, SamplingParams
from engine.outputs import EngineStats, StepOutput, WeightUpdate
from engine.timing import RequestTotals, StepSeconds
from kernels.checksum import combine_digests
from rollout import RolloutPool

VOCAB_SIZE = 2**15
MODEL: dict[str, Any] = {  # no file but this: neither weights nor tokenizer
    "architectures": ["LlamaForCausalLM"], "vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "tie_word_embeddings": True,
}  # fmt: skip
WEIGHT_SHAPES = {"model.norm.weight": (64,)}


@contextlib.contextmanager
def model_directory() -> Iterator[str]:
    """A directory with the config.json of a small model."""
    with tempfile.TemporaryDirectory() as directory:
        (Path(directory) / "config.json").write_text(json.dumps(MODEL))
        yield directory


@contextlib.contextmanager
def stub_pool(num_engines: int, seats: int, step_seconds: float) -> Iterator[RolloutPool]:
    """A pool whose engines run `seats` samples at once and take `step_seconds` for one token of each."""
    with model_directory() as directory:
        config = EngineConfig(directory, max_num_seqs=seats, num_threads=1)
        with RolloutPool(config, num_engines, engine_factory=StubFactory(step_seconds)) as pool:
            yield pool


def stub_weights(value: float) -> dict[str, torch.Tensor]:
    """What a sync of stubs needs."""
    return {name: torch.full(shape, value, dtype=torch.float32) for name, shape in WEIGHT_SHAPES.items()}


@dataclass(frozen=True, slots=True)
class StubFactory:
    """Picklable; see `RolloutPool(engine_factory=)`."""

    step_seconds: float

    def __call__(self, config: EngineConfig) -> StubEngine:
        return StubEngine(config, self.step_seconds)


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    request_id: str
    index: int
    num_tokens: int


class StubEngine:
    """What `EngineActor` and `EngineLoop` ask of an engine. A step sleeps and gives every running sample one token.

    Samples run to `max_tokens`, their tokens are zeros. A step costs the host nothing for samples that go on, so many
    stubs fit a small machine.
    """

    kernel_fingerprint = "stub"

    def __init__(self, config: EngineConfig, step_seconds: float) -> None:
        self.max_model_len = config.max_model_len or MODEL["max_position_embeddings"]
        self.weights_checksum = combine_digests({})
        self.policy_version = 0
        self.is_paused = False
        self._seats, self._step_seconds = config.max_num_seqs, step_seconds
        self._waiting: deque[_Sample] = deque()
        self._ending: dict[int, list[_Sample]] = {}  # running samples by their last step
        self._num_running = 0
        self._num_steps = 0

    def add_request(
        self, request_id: str, prompt_token_ids: Sequence[int], params: SamplingParams, resume: object = None
    ) -> None:
        assert resume is None, "a stub cannot go on from what another engine drew"
        self._waiting.extend(_Sample(request_id, index, params.max_tokens) for index in range(params.n))

    def can_step(self) -> bool:
        return not self.is_paused and bool(self._num_running or self._waiting)

    def step(self) -> StepOutput:
        self._seat_waiting()
        time.sleep(self._step_seconds)
        self._num_steps += 1
        ended = self._ending.pop(self._num_steps, [])
        self._num_running -= len(ended)
        return StepOutput(finished=[self._completion(sample, sample.num_tokens, "length") for sample in ended])

    def abort(self, request_ids: Iterable[str]) -> list[Completion]:
        """They end without a token."""
        gone, aborted = set(request_ids), []
        for queue in (self._waiting, *self._ending.values()):
            aborted += [sample for sample in queue if sample.request_id in gone]
        self._waiting = deque(sample for sample in self._waiting if sample.request_id not in gone)
        self._ending = {
            step: [sample for sample in samples if sample.request_id not in gone]
            for step, samples in self._ending.items()
        }
        self._num_running = sum(len(samples) for samples in self._ending.values())
        return [self._completion(sample, 0, "abort") for sample in aborted]

    def partial_completions(self) -> list[Completion]:
        return []

    def pause(self, mode: str) -> list[Completion]:
        self.is_paused = True
        return []

    def resume(self) -> None:
        self.is_paused = False

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        return WEIGHT_SHAPES

    def update_weights(
        self, named_tensors: Mapping[str, torch.Tensor], policy_version: int, mode: str, digests: dict[str, bytes]
    ) -> WeightUpdate:
        self.policy_version, self.weights_checksum = policy_version, combine_digests(digests)
        return WeightUpdate(checksum=self.weights_checksum, num_recomputed_tokens=0)

    def check_integrity(self) -> None:
        assert self._num_running == sum(len(samples) for samples in self._ending.values()) <= self._seats
        assert all(step > self._num_steps for step in self._ending), "a sample was to end in a step that has passed"

    def stats(self) -> EngineStats:
        return EngineStats(
            num_requests_running=self._num_running,
            num_requests_waiting=len(self._waiting),
            num_blocks=self._seats,
            num_free_blocks=self._seats - self._num_running,
            kv_cache_usage=self._num_running / self._seats,
            num_preemptions=0,
            prefix_cache_queries=0,
            prefix_cache_hits=0,
            prefix_cache_hit_rate=0.0,
            num_steps=self._num_steps,
            num_scheduled_tokens=0,
            num_generated_tokens=0,
            num_evictions=0,
            requests=RequestTotals(),
            step_seconds=StepSeconds(),
            policy_version=self.policy_version,
        )

    def _seat_waiting(self) -> None:
        while self._waiting and self._num_running < self._seats:
            sample = self._waiting.popleft()
            self._ending.setdefault(self._num_steps + sample.num_tokens, []).append(sample)
            self._num_running += 1

    def _completion(self, sample: _Sample, num_tokens: int, finish_reason: Literal["length", "abort"]) -> Completion:
        return Completion(
            request_id=sample.request_id,
            index=sample.index,
            token_ids=[0] * num_tokens,
            logprobs=[0.0] * num_tokens,
            policy_versions=[self.policy_version] * num_tokens,
            finish_reason=finish_reason,
            stop_reason=None,
            text="",
            is_exact=True,
        )
