"""Overlap: samples a second of a synchronous training loop and of asynchronous ones, on the same engines.

Engines are the real ones, scheduler, blocks and weight updates included, on a stand-in for the device that takes a time
for each step and for each token computed in it (by default those of an 8-billion model on an H100). What is not real is
the model's computation and the training, which is a sleep of half of the mean time in which the synchronous loop
generates a batch. Nothing else differs between the loops:

- Each trains on the same samples, with the same prompts and response lengths, in batches of the same number, and gives
  the engines new weights after each. Lengths are log-normal, P99 / median = 8, cut at the 99.9th percentile.
- The synchronous loop generates a batch, trains, syncs. All of the batch runs at once: engines have as many seats as it
  has samples, and the loop waits for nothing but the last sample, its training and the sync.
- An asynchronous loop submits a batch whenever `has_capacity` admits one, collects the next batch to finish, trains and
  syncs while the engines go on. A sync in `recompute` mode drops the KV of what runs, which the engines compute again
  on the device's time. Samples that would be too old are drawn again, and counted.
- Since all samples must be trained on, the long ones are too, and the asynchronous loops' time has their beginning,
  with empty hands, and their end, in which the queue runs dry.

A sample is a prompt of its own here, not a group; with groups the synchronous loop waits for the same longest sample,
and asynchronous ones for the longest of each group.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import mean, median

import numpy as np
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.step_plan import ModelRunnerOutput
from rollout import PoolHandle, Rollout, RolloutPool
from rollout.buffer import StalenessLimit
from scripts.bench_pool.stub import model_directory
from scripts.bench_scheduling.stand_in import NUM_TOKEN_IDS, PreparedStep, StandIn
from scripts.gpu_check.random_models import random_weights

P99_OVER_MEDIAN = 8.0
SIGMA = math.log(P99_OVER_MEDIAN) / 2.3263  # of the lengths' logarithm: the normal distribution's 99th percentile
LONGEST = math.exp(3.0902 * SIGMA)  # medians: the 99.9th percentile
PROMPT_TOKENS = 64
TRAINING_SHARE = 0.5  # of the time in which the synchronous loop generates a batch

SYNCHRONOUS = "synchronous"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Seconds of a step, and of each token that is computed in it besides."""

    step_seconds: float
    token_seconds: float


# 16.06 GB of bfloat16 weights over 3.35 TB/s, and 16.06 GFLOP a token over 60% of 989 TFLOP/s (Llama 3.1 8B; H100 SXM)
H100_8B = Device(step_seconds=16.06 / 3350, token_seconds=16.06e9 / (0.6 * 989e12))


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What every loop has to do."""

    device: Device
    num_engines: int
    batch_size: int  # samples that a version of the policy is made of
    num_batches: int
    median_tokens: int

    @property
    def num_samples(self) -> int:
        return self.batch_size * self.num_batches

    @property
    def max_tokens(self) -> int:
        return round(LONGEST * self.median_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """The samples of one seed, in the order in which they are asked for."""

    prompts: list[list[int]]
    lengths: list[int]

    @classmethod
    def draw(cls, job: Job, seed: int) -> Work:
        random = np.random.default_rng(seed)
        lengths = job.median_tokens * np.exp(SIGMA * random.standard_normal(job.num_samples))
        prompts = random.integers(NUM_TOKEN_IDS, size=(job.num_samples, PROMPT_TOKENS))
        return cls(prompts=prompts.tolist(), lengths=np.clip(lengths.round(), 1, job.max_tokens).astype(int).tolist())

    def part(self, start: int, end: int) -> tuple[list[list[int]], list[SamplingParams]]:
        """Prompts and parameters; every sample runs to its own length."""
        params = [SamplingParams(max_tokens=length, ignore_eos=True) for length in self.lengths[start:end]]
        return self.prompts[start:end], params


@dataclass(slots=True, kw_only=True)
class Run:
    """One loop on one seed's samples."""

    loop: str
    seconds: float = 0.0  # of all batches
    num_samples: int = 0  # trained on
    num_tokens: int = 0
    num_wasted: int = 0  # samples that were too old and drawn again
    num_recomputed_tokens: int = 0
    generation_seconds: list[float] = field(default_factory=list)  # for which the loop waited, by batch
    sync_seconds: list[float] = field(default_factory=list)
    staleness_means: list[float] = field(default_factory=list)  # of the tokens of a batch, in versions
    staleness_max: int = 0

    @property
    def samples_per_second(self) -> float:
        return self.num_samples / self.seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class Overlap:
    """Runs of every loop, seed by seed."""

    training_seconds: list[float]  # by seed
    runs: dict[str, list[Run]]  # by loop

    def over_synchronous(self, loop: str) -> list[float]:
        """Samples a second over the synchronous loop's, seed by seed."""
        pairs = zip(self.runs[loop], self.runs[SYNCHRONOUS], strict=True)
        return [run.samples_per_second / other.samples_per_second for run, other in pairs]


def measure(job: Job, max_staleness: Sequence[int], num_seeds: int) -> Overlap:
    """All loops on the samples of each seed; the synchronous one first, since it says how long training takes."""
    runs: dict[str, list[Run]] = {name: [] for name in (SYNCHRONOUS, *map(loop_name, max_staleness))}
    training_seconds = []
    with stand_in_pool(job) as (pool, weights):
        run_synchronously(pool, replace(job, num_batches=1), Work.draw(job, seed=1000), weights)  # pages are mapped
        for seed in range(num_seeds):
            work = Work.draw(job, seed)
            synchronous = run_synchronously(pool, job, work, weights)
            runs[SYNCHRONOUS].append(synchronous)
            training_seconds.append(TRAINING_SHARE * mean(synchronous.generation_seconds))
            for limit in max_staleness:
                run = run_asynchronously(pool, job, work, weights, limit, training_seconds[-1])
                runs[run.loop].append(run)
        pool.check_integrity()
    return Overlap(training_seconds=training_seconds, runs=runs)


def loop_name(max_staleness: int) -> str:
    return f"max_staleness {max_staleness}"


def run_synchronously(pool: PoolHandle, job: Job, work: Work, weights: dict[str, torch.Tensor]) -> Run:
    """Training takes its share of each batch's own generation: in sum, that of the mean."""
    run, start = Run(loop=SYNCHRONOUS), time.perf_counter()
    for number in range(job.num_batches):
        begin = time.perf_counter()
        groups = pool.generate(*work.part(number * job.batch_size, (number + 1) * job.batch_size))
        run.generation_seconds.append(time.perf_counter() - begin)
        note_batch(run, groups)
        time.sleep(TRAINING_SHARE * run.generation_seconds[-1])
        sync(run, pool, weights)
    run.seconds = time.perf_counter() - start
    check_complete(run, job, work)
    return run


def run_asynchronously(
    pool: RolloutPool,
    job: Job,
    work: Work,
    weights: dict[str, torch.Tensor],
    max_staleness: int,
    training_seconds: float,
) -> Run:
    handle = pool.handle()
    handle.staleness_limit = StalenessLimit(
        max_staleness=max_staleness, groups_per_version=job.batch_size, on_stale="redraw"
    )
    run, num_submitted, start = Run(loop=loop_name(max_staleness)), 0, time.perf_counter()
    for _ in range(job.num_batches):
        while num_submitted < job.num_samples and handle.has_capacity(job.batch_size):
            handle.submit(*work.part(num_submitted, num_submitted + job.batch_size))
            num_submitted += job.batch_size
        begin = time.perf_counter()
        groups = handle.collect(job.batch_size)
        run.generation_seconds.append(time.perf_counter() - begin)
        note_batch(run, groups)
        stats = handle.buffer_stats()
        run.staleness_means.append(stats.staleness_mean)
        run.staleness_max = max(run.staleness_max, stats.staleness_max)
        time.sleep(training_seconds)
        sync(run, handle, weights)
    run.seconds, run.num_wasted = time.perf_counter() - start, handle.buffer_stats().num_stale_redrawn
    check_complete(run, job, work)
    return run


def note_batch(run: Run, groups: Sequence[Sequence[Rollout]]) -> None:
    rollouts = [rollout for group in groups for rollout in group]
    run.num_samples += len(rollouts)
    run.num_tokens += sum(len(rollout.token_ids) for rollout in rollouts)


def sync(run: Run, pool: PoolHandle, weights: dict[str, torch.Tensor]) -> None:
    report = pool.sync_weights(weights, pool.policy_version + 1)
    assert report.is_lockstep, "an engine has other weights"
    run.sync_seconds.append(report.seconds)
    run.num_recomputed_tokens += report.num_recomputed_tokens


def check_complete(run: Run, job: Job, work: Work) -> None:
    assert run.num_samples == job.num_samples, "a loop trained on another number of samples"
    assert run.num_tokens == sum(work.lengths[: job.num_samples]), "a loop trained on other samples"


def median_ratio(ratios: Sequence[float]) -> str:
    """Median and range over the seeds."""
    return f"{median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})"


# --- the engines ---


@contextlib.contextmanager
def stand_in_pool(job: Job) -> Iterator[tuple[RolloutPool, dict[str, torch.Tensor]]]:
    """A pool of engines on stand-ins, with a seat for every sample of a batch, and weights for them."""
    seats = -(-job.batch_size // job.num_engines)
    max_model_len = PROMPT_TOKENS + job.max_tokens + 1
    with model_directory() as directory:
        config = EngineConfig(
            directory,
            max_num_seqs=seats,
            max_model_len=max_model_len,
            num_blocks=(seats + 1) * (1 + -(-max_model_len // 16)),  # nothing is preempted
            num_threads=1,
            async_scheduling=True,
        )
        with RolloutPool(config, job.num_engines, engine_factory=StandInFactory(job.device)) as pool:
            shapes = pool.engine_info.weight_shapes
            yield pool, {name: tensor.float() for name, tensor in random_weights(shapes, "cpu")}


@dataclass(frozen=True, slots=True)
class StandInFactory:
    """Picklable; see `RolloutPool(engine_factory=)`."""

    device: Device

    def __call__(self, config: EngineConfig) -> LLMEngine:
        runner = VersionedStandIn(self.device.step_seconds, config, self.device.token_seconds)
        engine = LLMEngine(config, make_weights=lambda shapes: random_weights(shapes, "cpu"), runner=runner)
        runner.policy_version = lambda: engine.policy_version
        return engine


class VersionedStandIn(StandIn):
    """Stamps tokens with the version of the weights, as the model runner does."""

    policy_version: Callable[[], int]

    def execute(self, prepared: PreparedStep) -> ModelRunnerOutput:
        return replace(super().execute(prepared), policy_version=self.policy_version())
