from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import rank_jobs
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import Policy
from trainers.ranks import make_ranks, start_accelerator
from trainers.sharding import assert_sharded

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=24, seed=3)
MAX_TOKENS = 40


@dataclasses.dataclass(frozen=True)
class World:
    """Several ranks on a model; what is compared is how they differ from one rank."""

    num_ranks: int
    parallelism: str
    numerics: str = "float32"
    family: str = "llama"
    model_options: tuple[tuple[str, bool], ...] = ()
    num_samples: int = 12

    def __str__(self) -> str:
        return f"{self.num_ranks}-{self.parallelism}-{self.numerics}-{self.family}"


UNTIED = (("tie_word_embeddings", False),)
WORLDS = [
    World(2, "ddp"),
    # three ranks, and samples for two of them
    World(3, "fsdp", numerics="bfloat16", model_options=UNTIED, num_samples=2),
    pytest.param(World(2, "fsdp", family="qwen2", model_options=UNTIED), marks=pytest.mark.slow),
    pytest.param(World(3, "ddp", family="qwen3", num_samples=2), marks=pytest.mark.slow),
    pytest.param(World(4, "fsdp", family="smollm3"), marks=pytest.mark.slow),
]


@pytest.fixture(scope="module", params=WORLDS, ids=str)
def steps(request, tiny_model_dir, draw_rollouts, tmp_path_factory) -> SimpleNamespace:
    """The same training step by one rank, in this process, and by several."""
    world: World = request.param
    model = str(tiny_model_dir(world.family, **dict(world.model_options)))
    engine = LLMEngine(EngineConfig(model=model, numerics=world.numerics, num_threads=2))
    rollouts = [r for group in draw_rollouts(engine, PROMPTS, PARAMS) for r in group][: world.num_samples]
    arguments = {
        "model": model,
        "numerics": world.numerics,
        "parallelism": world.parallelism,
        "rollouts": rollouts,
        "advantages": [(-1.0) ** i * (1 + i % 3) for i in range(len(rollouts))],
        "max_tokens": MAX_TOKENS,
    }
    checkpoints = {"ranks": tmp_path_factory.mktemp("of-ranks"), "one": tmp_path_factory.mktemp("of-one")}
    ranks = rank_jobs.run_ranks(
        tmp_path_factory.mktemp("ranks"),
        rank_jobs.train_one_step,
        world.num_ranks,
        checkpoint=checkpoints["ranks"],
        **arguments,
    )
    one = rank_jobs.train_one_step(checkpoint=checkpoints["one"], **arguments)
    return SimpleNamespace(world=world, one=one, ranks=ranks, rollouts=rollouts, checkpoints=checkpoints)


def test_logprobs_are_the_engines_bit_for_bit_on_any_number_of_ranks(steps):
    for step in (steps.one, *steps.ranks):
        assert torch.equal(torch.cat(step["logprobs"]), torch.cat(step["rollout_logprobs"]))
    by_rank = torch.cat([torch.cat(step["logprobs"]) for step in steps.ranks])
    assert torch.equal(by_rank, torch.cat(steps.one["logprobs"]))  # the ranks' parts follow each other


def test_gradients_are_the_same_sums_on_every_rank(steps):
    for name, gradient in steps.one["gradients"].items():
        assert gradient.abs().max() > 0
        for step in steps.ranks:
            torch.testing.assert_close(step["gradients"][name], gradient, rtol=1e-4, atol=1e-6)
            assert torch.equal(step["gradients"][name], steps.ranks[0]["gradients"][name])


def test_gradients_repeat_bit_for_bit(steps):
    assert all(step["is_repeatable"] for step in steps.ranks)


def test_ranks_without_samples_take_part(steps):
    num_batches = {step["num_batches"] for step in steps.ranks}
    assert len(num_batches) == 1
    if steps.world.num_samples < steps.world.num_ranks:
        assert any(step["num_idle"] == step["num_batches"] for step in steps.ranks)


def test_sharded_parameters_are_dtensors_and_each_rank_holds_its_part(steps):
    whole, num_ranks = steps.one["num_bytes"], steps.world.num_ranks
    is_sharded = steps.world.parallelism == "fsdp"
    assert whole["moments"] == 2 * whole["masters"] == 2 * whole["gradients"]
    for step in steps.ranks:
        assert step["parameter_types"] == (["DTensor"] if is_sharded else ["Parameter"])
        for kind, num_bytes in step["num_bytes"].items():
            # rows are shared out in whole rows, so some ranks hold one row more of each parameter
            assert num_bytes <= (1.05 * whole[kind] / num_ranks if is_sharded else whole[kind])
    if is_sharded:
        for kind in whole:
            assert sum(step["num_bytes"][kind] for step in steps.ranks) == whole[kind]


def test_the_optimisers_move_is_that_of_one_rank(steps):
    first = steps.ranks[0]
    assert first["metrics"]["actor/grad_norm"] == pytest.approx(steps.one["metrics"]["actor/grad_norm"], rel=1e-5)
    for step in steps.ranks:
        assert step["metrics"] == first["metrics"]
        assert step["weights"].keys() == steps.one["weights"].keys()
        for name, weight in step["weights"].items():
            assert torch.equal(weight, first["weights"][name])
            # AdamW's first move is learning_rate * sign(gradient), also where rounding decides the sign
            is_close = (weight - steps.one["weights"][name]).abs() < 1e-4
            assert is_close.float().mean() > 0.98
        assert step["moments"].keys() == steps.one["moments"].keys()
        for name, moment in step["moments"].items():
            torch.testing.assert_close(moment, steps.one["moments"][name], rtol=1e-3, atol=1e-6)


def test_gathered_weights_are_those_the_ranks_compute_with(steps, tiny_model_dir):
    """One rank with the gathered weights gives the sharded ranks' log-probabilities, bit for bit."""
    world = steps.world
    policy = Policy(
        str(tiny_model_dir(world.family, **dict(world.model_options))), numerics=world.numerics, num_threads=1
    )
    policy.load_weights(steps.ranks[-1]["weights"])
    batch = rank_jobs.whole_batch(steps.rollouts)
    by_rank = torch.cat([torch.cat(step["new_logprobs"]) for step in steps.ranks])
    assert torch.equal(policy.token_logprobs(batch), by_rank)


def test_one_parameter_is_gathered_at_a_time(steps):
    if steps.world.parallelism == "fsdp":
        assert [step["num_gathered"] for step in steps.ranks] == [1] * steps.world.num_ranks


def test_the_expected_reward_is_the_same_bits_on_any_number_of_ranks(steps, tiny_model_dir):
    world = steps.world
    model = str(tiny_model_dir(world.family, **dict(world.model_options)))
    one = Policy(model, numerics=world.numerics, num_threads=1)
    one.load_weights(steps.ranks[0]["weights"])
    assert [step["expected_reward"] for step in steps.ranks] == [rank_jobs.expected_reward(one)] * world.num_ranks


@pytest.mark.parametrize("writer", ["ranks", pytest.param("one", marks=pytest.mark.slow)])
def test_any_number_of_ranks_goes_on_from_a_checkpoint_of_any_number(steps, writer, tiny_model_dir, tmp_path):
    """A checkpoint does not know how many ranks saved it: each finds the same bits in it."""
    world = steps.world
    saved = steps.ranks[0] if writer == "ranks" else steps.one
    arguments = {
        "model": str(tiny_model_dir(world.family, **dict(world.model_options))),
        "numerics": world.numerics,
        "parallelism": world.parallelism,
        "checkpoint": steps.checkpoints[writer],
        "rollouts": steps.rollouts,
        "advantages": [1.0] * len(steps.rollouts),
    }
    one = rank_jobs.go_on(**arguments)
    for found in (one, *rank_jobs.run_ranks(tmp_path, rank_jobs.go_on, world.num_ranks, **arguments)):
        assert (found["policy_version"], found["num_updates"]) == (1, 1)
        for kind, whole in (("loaded", saved["weights"]), ("moments", saved["moments"])):
            assert found[kind].keys() == whole.keys()
            assert all(torch.equal(found[kind][name], tensor) for name, tensor in whole.items())
        for name, weight in found["weights"].items():
            assert (weight - one["weights"][name]).abs().max() < 1e-3


def test_a_parameter_that_is_whole_is_named(tiny_model_dir):
    policy = Policy(str(tiny_model_dir("llama")), num_threads=1)
    with pytest.raises(AssertionError, match=r"embedding\.master is not sharded"):
        assert_sharded(policy.model)


def test_one_rank_needs_no_process_group(tiny_model_dir):
    policy = Policy(str(tiny_model_dir("llama")), num_threads=1, parallelism="fsdp")
    assert (policy.ranks.rank, policy.ranks.num_ranks, policy.ranks.parallelism) == (0, 1, None)
    assert not torch.distributed.is_initialized()


def test_an_unknown_parallelism_is_named():
    with pytest.raises(ValueError, match="parallelism='tp' must be one of 'ddp', 'fsdp'"):
        make_ranks(start_accelerator(), "tp")
