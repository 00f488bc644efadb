"""Runs whose engines draw while the trainer works: exact, bounded in age, and, one version behind, repeatable."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from rollout import EngineConfig
from trainers import GRPOConfig, GRPOTrainer

ROWS = [{"prompt": f"what is {a} + {b}? ", "answer": str(a + b)} for a in range(1, 7) for b in range(1, 4)]
CONFIG = GRPOConfig(
    num_steps=5,
    num_prompts=3,
    group_size=4,
    max_tokens=12,
    learning_rate=1e-2,
    micro_batch_tokens=128,
    num_threads=1,
    num_iterations=2,
    reward_processes=0,
    seed=1,
)


@pytest.fixture(scope="module")
def engine_config(tiny_model_dir) -> EngineConfig:
    return EngineConfig(model=str(tiny_model_dir("llama")), num_threads=1)


def every_other_one(completions):
    """Rewards that no group has alike, so that every step makes a version."""
    return [float(i % 2) for i in range(len(completions))]


def run(engine_config: EngineConfig, reward=every_other_one, **changes) -> SimpleNamespace:
    """A run with what every step was drawn under."""
    versions, ids = [], []

    def look(metrics: dict[str, float]) -> None:
        if trainer.batch is not None:
            rollouts = [rollout for group in trainer.batch.groups for rollout in group]
            versions.append({version for rollout in rollouts for version in rollout.policy_versions})
            ids.append([group[0].group_id for group in trainer.batch.groups])

    trainer = GRPOTrainer(dataclasses.replace(CONFIG, **changes), engine_config, ROWS, reward, callbacks=[look])
    return SimpleNamespace(history=trainer.train(), versions=versions, ids=ids)


def settled(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without what depends on the clock."""
    return [
        {name: value for name, value in metrics.items() if not name.startswith(("timing_s/", "perf/", "weight_sync/"))}
        for metrics in history
    ]


@pytest.mark.parametrize("lag", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_lagged_run_is_exact_and_of_a_fixed_age(local_ray, engine_config, lag):
    first = run(engine_config, mode="lagged", max_staleness=lag)
    assert first.versions == [{max(0, step - 1 - lag)} for step in range(1, 6)]
    assert [metrics["staleness/mean"] for metrics in first.history[1:]] == [min(step, lag) for step in range(5)]
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in first.history[1:]] == [0.0] * 5
    assert first.history[-1]["mismatch/num_stale_tokens"] == first.history[-1]["mismatch/num_tokens"] > 0
    assert first.ids == [[f"step{step}-prompt{p}" for p in range(3)] for step in range(1, 6)]


@pytest.mark.slow
def test_a_lagged_run_repeats_to_the_bit(local_ray, engine_config):
    first, second = (run(engine_config, mode="lagged", num_engines=num_engines) for num_engines in (1, 2))
    assert settled(first.history) == settled(second.history)
    assert first.ids == second.ids


@pytest.mark.parametrize("sync_mode", ["recompute", pytest.param("wait", marks=pytest.mark.slow)])
def test_an_asynchronous_run_is_exact_version_by_version_and_never_too_old(local_ray, engine_config, sync_mode):
    seen = run(engine_config, mode="async", max_staleness=2, sync_mode=sync_mode, max_tokens=60)
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in seen.history[1:]] == [0.0] * 5
    assert all(metrics["staleness/max"] <= 2 for metrics in seen.history[1:])
    assert all(min(versions) >= step - 1 - 2 for step, versions in enumerate(seen.versions, start=1))
    assert max(metrics["staleness/max"] for metrics in seen.history[1:]) >= 1
    assert sum(metrics["mismatch/num_stale_tokens"] for metrics in seen.history[1:]) > 0
    drawn = [group_id for batch in seen.ids for group_id in batch]
    assert len(set(drawn)) == len(drawn) == 15


def test_groups_without_spread_are_replaced_while_that_is_allowed(local_ray, engine_config):
    """The first step draws three that are alike and three that are not, the second none but such that are alike."""

    def fourth_to_sixth_prompt_have_spread(prompts, completions):
        place = seen.setdefault(prompts[0], len(seen))
        return [float(i == 0 and 3 <= place < 6) for i in range(len(completions))]

    seen: dict[str, int] = {}
    first, second = run(engine_config, fourth_to_sixth_prompt_have_spread, num_steps=2, max_refills=2).history[1:]
    assert (first["reward/num_refills"], first["frac_reward_zero_std"], first["policy_version"]) == (1, 0.5, 1)
    assert (second["reward/num_refills"], second["frac_reward_zero_std"], second["policy_version"]) == (2, 1.0, 1)
    assert len(seen) == 6 + 9


@pytest.mark.parametrize("mode", ["async", pytest.param("lagged", marks=pytest.mark.slow)])
def test_batches_that_teach_nothing_do_not_stop_a_run(local_ray, engine_config, mode):
    """No version comes of them, so nothing but the trainer's word makes room for others."""
    changes = {"max_refills": 2, "num_steps": 2} if mode == "async" else {"num_steps": 4}
    seen = run(engine_config, lambda completions: [1.0] * len(completions), mode=mode, **changes)
    assert [len(ids) for ids in seen.ids] == ([9, 9] if mode == "async" else [3] * 4)
    assert seen.history[-1]["actor/num_skipped_steps"] == len(seen.ids)


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ValueError, match='max_refills=1 needs mode="sync" or "async"'):
        GRPOConfig(max_refills=1, mode="lagged")
    with pytest.raises(ValueError, match="mode='late' must be one of 'sync', 'lagged', 'async'"):
        GRPOConfig(mode="late")
    with pytest.raises(ValueError, match="max_staleness=0 must be at least 1"):
        GRPOConfig(mode="async", max_staleness=0)
