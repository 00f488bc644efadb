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
NUM_TRAINED = 9  # samples; the others are only compared
COMMON = {
    "learning_rate": 1e-4, "warmup_steps": 0, "micro_batch_tokens": 40, "max_tokens": 12, "num_threads": 1,
    "mode": "async", "max_staleness": 1,
}  # fmt: skip
CONFIGS = {name: GRPOConfig.for_algorithm(name, **COMMON) for name in ALGORITHMS} | {
    "moving_reference": GRPOConfig(**COMMON, kl_coef=0.1, reference_update_every=1, reference_mixup=0.25),
}
RUNS = [
    ("fsdp", ("reinforce_pp", "moving_reference")),
    pytest.param(("ddp", ("reinforce_pp", "reinforce_pp_baseline", "moving_reference")), marks=pytest.mark.slow),
    pytest.param(("ddp", ("grpo", "dr_grpo", "dapo")), marks=pytest.mark.slow),
    pytest.param(("fsdp", ("gspo", "cispo", "rloo")), marks=pytest.mark.slow),
]
FIRST, SECOND = {"rel": 1e-4, "abs": 1e-6}, {"rel": 1e-2, "abs": 1e-4}  # in the second the weights differ, too
EXACT = ("mismatch/", "actor/num_", "policy_version", "actor/lr")


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: "-".join((run[0], *run[1])))
def runs(request, tiny_model_dir, draw_rollouts, tmp_path_factory) -> SimpleNamespace:
    """Some configs by one rank, in this process, and by two."""
    parallelism, names = request.param
    model = str(tiny_model_dir("llama"))
    engine = LLMEngine(EngineConfig(model=model, num_threads=1))
    rollouts = [r for group in draw_rollouts(engine, PROMPTS, PARAMS) for r in group]
    arguments = {
        "model": model,
        "configs": [dataclasses.replace(CONFIGS[name], trainer_parallelism=parallelism) for name in names],
        "rollouts": rollouts,
        "advantages": [(-1.0) ** i * (1 + i % 3) for i in range(NUM_TRAINED)],
        "checkpoints": tmp_path_factory.mktemp("checkpoints"),
    }
    one = rank_jobs.train_grpo(**arguments)
    ranks = rank_jobs.run_ranks(tmp_path_factory.mktemp("ranks"), rank_jobs.train_grpo, 2, **arguments)
    return SimpleNamespace(
        one=dict(zip(names, one, strict=True)),
        ranks=[dict(zip(names, of_rank, strict=True)) for of_rank in ranks],
        num_tokens=sum(len(r.token_ids) for r in rollouts),
        num_trained_tokens=sum(len(r.token_ids) for r in rollouts[:NUM_TRAINED]),
    )


def test_metrics_are_those_of_the_whole_batch_on_every_rank(runs):
    for name, one in runs.one.items():
        for step, tolerance in (("first", FIRST), ("second", SECOND)):
            metrics = runs.ranks[0][name][step]
            assert metrics == runs.ranks[1][name][step], name
            assert metrics.keys() == one[step].keys()
            for key, value in metrics.items():
                expected = one[step][key]
                assert value == (expected if key.startswith(EXACT) else pytest.approx(expected, **tolerance)), (
                    name,
                    key,
                )


def test_fresh_and_stale_tokens_of_all_ranks_are_compared_and_equal(runs):
    for found in runs.ranks[0].values():
        first, second = found["first"], found["second"]
        assert first["mismatch/num_tokens"] == second["mismatch/num_tokens"] == runs.num_tokens
        assert (first["mismatch/num_stale_tokens"], second["mismatch/num_stale_tokens"]) == (0, runs.num_tokens)
        assert first["mismatch/logprob_abs_diff_max"] == second["mismatch/logprob_abs_diff_max"] == 0.0
        assert first["actor/num_tokens"] == runs.num_trained_tokens
        assert second["correction/weight_mean"] != 1.0


def test_two_ranks_go_on_from_their_checkpoint_bit_for_bit(runs):
    for name, found in runs.ranks[0].items():
        assert found["second_resumed"] == found["second"]
        for key, weight in found["weights"].items():
            assert torch.equal(found["weights_resumed"][key], weight), (name, key)
            assert torch.equal(runs.ranks[1][name]["weights"][key], weight), (name, key)


def test_rank_0_alone_hands_the_weights_over(runs):
    for name, one in runs.one.items():
        assert one["synced"][1:] == (1, "keep")
        assert [of_rank[name]["synced"] for of_rank in runs.ranks] == [one["synced"], None]


def test_ranks_rest_together(runs):
    for of_rank in runs.ranks:
        for found in of_rank.values():
            assert (found["rest"]["actor/num_skipped_steps"], found["rest"]["policy_version"]) == (1, 2)
