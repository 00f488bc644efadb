from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import rank_jobs
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import ALGORITHMS, GRPOConfig

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 70))]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=3)
COMMON = {
    "learning_rate": 1e-4, "warmup_steps": 0, "micro_batch_tokens": 40, "max_tokens": 12, "num_threads": 1,
    "mode": "async", "max_staleness": 1,
}  # fmt: skip
CONFIGS = {name: GRPOConfig.for_algorithm(name, **COMMON) for name in ALGORITHMS} | {
    "moving_reference": GRPOConfig(**COMMON, kl_coef=0.1, reference_update_every=1, reference_mixup=0.25),
    "kl_in_reward": GRPOConfig.for_algorithm("reinforce_pp", **COMMON, kl_coef=0.1, kl_in="reward"),
}
FIRST, SECOND = {"rel": 1e-4, "abs": 1e-6}, {"rel": 1e-2, "abs": 1e-4}  # in the second the weights differ, too
EXACT = ("mismatch/", "actor/num_", "policy_version", "actor/lr")


@pytest.fixture(scope="module", params=["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def runs(request, tiny_model_dir, draw_rollouts, tmp_path_factory) -> SimpleNamespace:
    """Every config by one rank, in this process, and by two."""
    model = str(tiny_model_dir("llama"))
    engine = LLMEngine(EngineConfig(model=model, num_threads=1))
    rollouts = [r for group in draw_rollouts(engine, PROMPTS, PARAMS) for r in group]
    advantages = [(-1.0) ** i * (1 + i % 3) for i in range(9)]
    configs = [dataclasses.replace(config, trainer_parallelism=request.param) for config in CONFIGS.values()]
    arguments = {"model": model, "configs": configs, "rollouts": rollouts, "advantages": advantages}
    arguments["directory"] = tmp_path_factory.mktemp("checkpoints")
    one = rank_jobs.train_grpo(**arguments)
    ranks = rank_jobs.run_ranks(tmp_path_factory.mktemp("ranks"), rank_jobs.train_grpo, 2, **arguments)
    return SimpleNamespace(
        one=dict(zip(CONFIGS, one, strict=True)),
        ranks=[dict(zip(CONFIGS, of_rank, strict=True)) for of_rank in ranks],
        num_tokens=sum(len(r.token_ids) for r in rollouts),
        num_trained_tokens=sum(len(r.token_ids) for r in rollouts[: len(advantages)]),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_metrics_are_those_of_the_whole_batch_on_every_rank(runs, name):
    one = runs.one[name]
    for step, tolerance in (("first", FIRST), ("second", SECOND)):
        for of_rank in runs.ranks:
            metrics = of_rank[name][step]
            assert metrics.keys() == one[step].keys()
            for key, value in metrics.items():
                expected = one[step][key]
                assert value == (expected if key.startswith(EXACT) else pytest.approx(expected, **tolerance)), key
        assert runs.ranks[0][name][step] == runs.ranks[1][name][step]


@pytest.mark.parametrize("name", CONFIGS)
def test_fresh_and_stale_tokens_of_all_ranks_are_compared_and_equal(runs, name):
    for of_rank in runs.ranks:
        first, second = of_rank[name]["first"], of_rank[name]["second"]
        assert first["mismatch/num_tokens"] == second["mismatch/num_tokens"] == runs.num_tokens
        assert (first["mismatch/num_stale_tokens"], second["mismatch/num_stale_tokens"]) == (0, runs.num_tokens)
        assert first["mismatch/logprob_abs_diff_max"] == second["mismatch/logprob_abs_diff_max"] == 0.0
        assert first["actor/num_tokens"] == runs.num_trained_tokens
    assert ("correction/weight_mean" in second) == (CONFIGS[name].correction != "none")


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_go_on_from_their_checkpoint_bit_for_bit(runs, name):
    for of_rank in runs.ranks:
        found = of_rank[name]
        assert found["second_resumed"] == found["second"]
        assert all(torch.equal(found["weights_resumed"][key], weight) for key, weight in found["weights"].items())
        assert all(torch.equal(runs.ranks[0][name]["weights"][key], w) for key, w in found["weights"].items())


@pytest.mark.parametrize("name", CONFIGS)
def test_rank_0_alone_hands_the_weights_over(runs, name):
    assert [of_rank[name]["synced"] for of_rank in runs.ranks] == [runs.one[name]["synced"], None]
    assert runs.one[name]["synced"][1:] == (1, "keep")


def test_ranks_rest_together(runs):
    for of_rank in runs.ranks:
        assert of_rank["grpo"]["rest"]["actor/num_skipped_steps"] == 1
        assert of_rank["grpo"]["rest"]["policy_version"] == 2
