"""Requests of every kind come and go for a long time, and nothing of them stays."""

from __future__ import annotations

import gc
import os
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.checkpoint import iter_weights

PAGE = os.sysconf("SC_PAGE_SIZE")


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


class Traffic:
    """Random requests with aborts, forks, resumed completions and weight updates on an engine that must preempt."""

    def __init__(self, engine: LLMEngine, weights: dict[str, torch.Tensor]) -> None:
        self.engine, self.weights = engine, weights
        self.random = random.Random(0)
        self.num_added = 0
        self.open: Counter[str] = Counter()  # samples to come, by request id

    def run(self, num_requests: int) -> None:
        end = self.num_added + num_requests
        while self.num_added < end or self.open:
            while self.num_added < end and len(self.open) < 24:
                self.add()
            if self.random.random() < 0.05 and self.open:
                self.abort()
            if self.random.random() < 0.002:
                mode = self.random.choice(["recompute", "keep", "wait", "abort"])
                self.engine.update_weights(self.weights, self.engine.policy_version + 1, mode=mode)
            if self.random.random() < 0.002:
                self.engine.reset_prefix_cache(preempt_running=self.random.random() < 0.5)
            self.take(self.engine.step().finished)
            if self.num_added % 100 == 0:
                self.engine.check_integrity()

    def add(self, resume: tuple = ()) -> None:
        name, choose = f"r{self.num_added}", self.random.choice
        self.num_added += 1
        prompt = [choose(range(3, 5)) for _ in range(self.random.randrange(1, 24))]
        params = SamplingParams(
            n=choose([1, 1, 1, 2, 4]), max_tokens=self.random.choice([1, 2, 4, 8, 40]), seed=self.num_added,
            top_k=choose([0, 0, 0, 5]), presence_penalty=choose([0.0, 0.0, 0.0, 1.0]), logprobs=choose([0, 0, 0, 2]),
        )  # fmt: skip
        self.engine.add_request(name, prompt, params, priority=choose([0, 0, 1]))
        self.open[name] = params.n

    def abort(self) -> None:
        self.take(self.engine.abort([self.random.choice(list(self.open))]))

    def take(self, completions: list) -> None:
        for completion in completions:
            self.open[completion.request_id] -= 1
            if not self.open[completion.request_id]:
                del self.open[completion.request_id]


@pytest.mark.parametrize(
    "num_requests", [pytest.param(1_500, id="1500"), pytest.param(100_000, id="100k", marks=pytest.mark.slow)]
)
def test_memory_stays_flat_and_every_block_comes_back(
    tiny_model_dir: Callable[..., Path], num_requests: int, record_property: Callable[[str, object], None]
) -> None:
    directory = tiny_model_dir()
    engine = LLMEngine(
        EngineConfig(
            str(directory), num_blocks=14, max_num_seqs=24, max_num_batched_tokens=96, num_threads=1,
            async_scheduling=True, num_scheduler_steps=2,
        )
    )  # fmt: skip
    traffic = Traffic(engine, dict(iter_weights(directory)))
    traffic.run(num_requests // 5)
    before = resident_bytes()
    traffic.run(num_requests - num_requests // 5)
    growth = resident_bytes() / before - 1
    engine.check_integrity()
    stats = engine.stats()
    record_property("growth", growth)
    print(f"{num_requests} requests, {stats.num_preemptions} preemptions, resident memory {growth:+.2%}")
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_preemptions > num_requests / 100
    assert not engine.has_unfinished()
    assert growth < 0.01
