from __future__ import annotations

import dataclasses
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest
import ray
import torch
from ray.exceptions import RayTaskError
from reward_functions import has_letter_e

from rollout import EngineConfig, RolloutPool, SamplingParams
from tests.rollout.waiting import has_ended, wait_for
from trainers import GRPOConfig, GRPOTrainer, Policy
from trainers.trainer_group import TrainerRankError, start_trainer_group

PROMPTS = ["what is it? ", "it is ", "so "]
PARAMS = SamplingParams(n=4, max_tokens=8)
CONFIG = GRPOConfig(
    num_steps=2, num_prompts=3, group_size=4, max_tokens=8, learning_rate=1e-3, micro_batch_tokens=32, num_threads=1,
    num_trainer_ranks=2, trainer_parallelism="fsdp", trainer_timeout=30.0, warmup_steps=0,
)  # fmt: skip
ROWS = [{"prompt": prompt, "answer": "1"} for prompt in PROMPTS]


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def pool(local_ray, model):
    with RolloutPool(EngineConfig(model=model, num_threads=1)) as pool:
        yield pool


@pytest.fixture
def start(pool):
    """Starts a group of ranks, with changes to the config; it is ended with the test."""
    started = []

    def start(**changes) -> SimpleNamespace:
        group = start_trainer_group(dataclasses.replace(CONFIG, **changes), pool.handle())
        started.append(group)
        return SimpleNamespace(actor=group, process_ids=ask(group.process_ids))

    yield start
    for group in started:
        ray.kill(group)


def ask(method, *arguments):
    try:
        return ray.get(method.remote(*arguments))
    except RayTaskError as error:
        raise error.cause from error


def draw(pool, version: int):
    groups = pool.generate(PROMPTS, PARAMS, group_ids=[f"v{version}-{time.monotonic_ns()}-{p}" for p in range(3)])
    rollouts = [rollout for group in groups for rollout in group]
    return rollouts, [(-1.0) ** i for i in range(len(rollouts))]


@pytest.mark.slow
def test_a_run_on_sharded_ranks_is_exact_and_saves_its_weights(local_ray, model, tmp_path):
    config = dataclasses.replace(CONFIG, output_dir=str(tmp_path))
    trainer = GRPOTrainer(config, EngineConfig(model=model, num_threads=1), ROWS, has_letter_e, eval_rows=ROWS[:1])
    history = trainer.train()
    assert all(metrics["mismatch/num_tokens"] > 0 for metrics in history[1:])
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in history[1:]] == [0.0, 0.0]
    assert [metrics["actor/ppo_kl"] for metrics in history[1:]] == [0.0, 0.0]
    environment = trainer.environment["trainer"]
    assert [(e["rank"], e["num_ranks"], e["parallelism"]) for e in environment["ranks"]] == [
        (0, 2, "fsdp"), (1, 2, "fsdp"),
    ]  # fmt: skip
    assert [e["num_threads"] for e in environment["ranks"]] == [1, 1]
    saved = Policy(str(tmp_path / "weights"), num_threads=1)
    rewards = history[-1]["eval/expected_reward"]
    assert saved.expected_reward([PROMPTS[0]], [" 1\n"]) == rewards


@pytest.mark.slow
def test_a_run_on_two_ranks_goes_on_from_its_checkpoint_bit_for_bit(local_ray, model, tmp_path):
    def run(name: str, **changes) -> list[dict[str, float]]:
        directories = {"checkpoint_dir": str(tmp_path / name), "output_dir": str(tmp_path / name)}
        config = dataclasses.replace(CONFIG, checkpoint_every=1, **directories, **changes)
        return GRPOTrainer(config, EngineConfig(model=model, num_threads=1), ROWS, has_letter_e).train()

    whole = run("whole", num_steps=3)
    run("cut", num_steps=1)
    rest = run("cut", num_steps=3, resume="auto")
    assert [metrics["step"] for metrics in rest] == [2, 3]
    assert [without_time(metrics) for metrics in rest] == [without_time(metrics) for metrics in whole[2:]]
    weights, expected = (Policy(str(tmp_path / name / "weights"), num_threads=1) for name in ("cut", "whole"))
    for (name, weight), (_, other) in zip(weights.named_weights(), expected.named_weights(), strict=True):
        assert torch.equal(weight, other), name


def without_time(metrics: dict[str, float]) -> dict[str, float]:
    timed = ("timing_s/", "perf/", "weight_sync/pause_seconds")
    return {name: value for name, value in metrics.items() if not name.startswith(timed)}


@pytest.mark.parametrize("parallelism", ["fsdp", pytest.param("ddp", marks=pytest.mark.slow)])
def test_a_rank_killed_in_a_step_is_named_and_the_others_end(start, pool, parallelism):
    rollouts, advantages = draw(pool, 0)
    group = start(trainer_parallelism=parallelism, num_iterations=100_000)
    killer = threading.Timer(2.0, os.kill, (group.process_ids[1], signal.SIGKILL))
    killer.start()
    begin = time.monotonic()
    with pytest.raises(TrainerRankError, match=r"trainer rank 1 died.*of 2 ranks, in step"):
        ask(group.actor.step, rollouts, advantages)
    assert time.monotonic() - begin < 2 + CONFIG.trainer_timeout + 30
    wait_for(lambda: all(map(has_ended, group.process_ids)), 10)
    with pytest.raises(TrainerRankError, match="rank 1 died"):
        ask(group.actor.sync)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_after_the_timeout(start, pool):
    rollouts, advantages = draw(pool, 0)
    group = start(trainer_timeout=5.0, num_iterations=100_000)
    killer = threading.Timer(2.0, os.kill, (group.process_ids[1], signal.SIGSTOP))
    killer.start()
    begin = time.monotonic()
    with pytest.raises(TrainerRankError, match="rank 1 did not answer; rank 0 raised"):
        ask(group.actor.step, rollouts, advantages)
    assert time.monotonic() - begin < 2 + 5 + 10 + 40
    wait_for(lambda: all(map(has_ended, group.process_ids)), 20)


def test_a_group_survives_mistakes_that_all_ranks_see_and_its_ranks_end_with_it(start, pool):
    """Comes last of those that use the pool, whose weights it moves to version 1."""
    group = start(trainer_parallelism="fsdp")
    rollouts, advantages = draw(pool, 0)
    with pytest.raises(ValueError, match="policy_version=0"):
        ask(group.actor.sync)  # the engines have it; rank 0 hears so, and the others have gathered for nothing
    foreign = [dataclasses.replace(rollouts[0], kernel_fingerprint="another"), *rollouts[1:]]
    with pytest.raises(ValueError, match="fingerprint another"):
        ask(group.actor.step, foreign, advantages)
    metrics = ask(group.actor.step, rollouts, advantages)
    assert metrics["mismatch/num_tokens"] == metrics["actor/num_tokens"] == sum(len(r.token_ids) for r in rollouts)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert ask(group.actor.sync).policy_version == 1
    fresh, advantages = draw(pool, 1)
    assert ask(group.actor.step, fresh[:1], advantages[:1], fresh[1:])["mismatch/logprob_abs_diff_max"] == 0.0
    ray.kill(group.actor)
    wait_for(lambda: all(map(has_ended, group.process_ids)), 20)


@pytest.mark.parametrize("field", [{"num_trainer_ranks": 0}, {"trainer_timeout": 0.0}, {"trainer_parallelism": "tp"}])
def test_wrong_settings_of_ranks_are_named(field):
    ((name, value),) = field.items()
    with pytest.raises(ValueError, match=f"{name}={value!r}"):
        GRPOConfig(**field)
