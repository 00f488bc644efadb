from __future__ import annotations

import pytest
import rank_jobs
import torch
from safetensors.torch import load_file

from trainers import Policy
from trainers.batch import pack_tokens
from trainers.optimizer_file import load_optimizer
from trainers.optimizer_state import load_optimizer_tensors

BATCH = pack_tokens([list(range(5, 25)), [7]], [[list(range(40, 60)), [3, 4]], [list(range(100, 130))]])


@pytest.fixture
def start(tiny_model_dir):
    return lambda: Policy(str(tiny_model_dir("llama")), num_threads=1, learning_rate=1e-2)


def steps(policy: Policy, num_steps: int) -> None:
    for _ in range(num_steps):
        policy.forward_backward(BATCH, rank_jobs.mean_loss(BATCH.num_targets))
        policy.optim_step()


def load(policy: Policy, state: dict[str, torch.Tensor]) -> None:
    load_optimizer_tensors(policy.optimizer.optimizer.optimizer, dict(policy.model.named_parameters()), state.items())


def test_a_policy_with_the_loaded_state_goes_on_bit_for_bit(start):
    policy, other = start(), start()
    steps(policy, 2)
    other.load_weights({name: tensor.clone() for name, tensor in policy.named_weights()})
    load(other, rank_jobs.moments(policy))
    other.optimizer.num_updates = policy.optimizer.num_updates
    steps(policy, 2)
    steps(other, 2)
    for (name, weight), (_, own) in zip(policy.named_weights(), other.named_weights(), strict=True):
        assert torch.equal(weight, own), name
    moments = rank_jobs.moments(other)
    for name, tensor in rank_jobs.moments(policy).items():
        assert torch.equal(tensor, moments[name]), name


def test_an_optimiser_before_its_first_step_has_no_state(start):
    policy, other = start(), start()
    assert rank_jobs.moments(policy) == {}
    steps(other, 1)
    load(other, {})
    assert rank_jobs.moments(other) == {}


def test_a_state_that_does_not_fit_is_named_and_leaves_the_optimiser_alone(start):
    policy = start()
    steps(policy, 1)
    state = rank_jobs.moments(policy)
    first = "embedding.master.exp_avg"
    for wrong, message in (
        ({"embedding.master.momentum": state[first]}, r"embedding\.master\.momentum"),
        ({"elsewhere.exp_avg": state[first]}, r"other parameters, such as 'elsewhere\.exp_avg'"),
        ({**state, first: state[first][:5]}, r"embedding\.master\.exp_avg.*shape \(5, 64\)"),
        ({name: tensor for name, tensor in state.items() if name != first}, "not all of"),
    ):
        with pytest.raises(ValueError, match=message):
            load(policy, wrong)
        assert all(torch.equal(state[name], tensor) for name, tensor in rank_jobs.moments(policy).items())


def test_the_file_is_one_that_safetensors_reads(start, tmp_path):
    policy = start()
    steps(policy, 1)
    policy.save_checkpoint(tmp_path)
    path, state = tmp_path / "optimizer.safetensors", rank_jobs.moments(policy)
    for found in (load_file(path), dict(load_optimizer(path)[0])):
        assert found.keys() == state.keys()
        assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    assert load_optimizer(path)[1] == {"num_updates": 1, "policy_version": 1}


def test_a_file_that_ends_early_is_refused(start, tmp_path):
    policy = start()
    steps(policy, 1)
    policy.save_checkpoint(tmp_path)
    path = tmp_path / "optimizer.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="not a readable optimiser file"):
        load_optimizer(path)
