from __future__ import annotations

import pytest
import rank_jobs
import torch

from trainers import Policy
from trainers.batch import pack_tokens
from trainers.optimizer_state import load_optimizer_tensors, optimizer_tensors

BATCH = pack_tokens([list(range(5, 25)), [7]], [[list(range(40, 60)), [3, 4]], [list(range(100, 130))]])


@pytest.fixture
def start(tiny_model_dir):
    return lambda: Policy(str(tiny_model_dir("llama")), num_threads=1, learning_rate=1e-2)


def steps(policy: Policy, num_steps: int) -> None:
    for _ in range(num_steps):
        policy.forward_backward(BATCH, rank_jobs.mean_loss(BATCH.num_targets))
        policy.optim_step()


def copied(tensors) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors}


def test_a_policy_with_the_loaded_state_goes_on_bit_for_bit(start):
    policy, other = start(), start()
    steps(policy, 2)
    other.load_weights(copied(policy.named_weights()))
    load_optimizer_tensors(other, optimizer_tensors(policy))
    other.policy_version = policy.policy_version
    steps(policy, 2)
    steps(other, 2)
    for (name, weight), (_, own) in zip(policy.named_weights(), other.named_weights(), strict=True):
        assert torch.equal(weight, own), name
    for (name, tensor), (_, own) in zip(optimizer_tensors(policy), optimizer_tensors(other), strict=True):
        assert torch.equal(tensor, own), name


def test_an_optimiser_before_its_first_step_has_no_state(start):
    policy, other = start(), start()
    assert list(optimizer_tensors(policy)) == []
    steps(other, 1)
    load_optimizer_tensors(other, {}.items())
    assert list(optimizer_tensors(other)) == []


def test_a_state_that_does_not_fit_is_named_and_leaves_the_optimiser_alone(start):
    policy = start()
    steps(policy, 1)
    state = copied(optimizer_tensors(policy))
    first = "exp_avg/embedding.master"
    for wrong, message in (
        ({"momentum/embedding.master": state[first]}, "momentum/embedding.master"),
        ({**state, first: state[first][:5]}, r"exp_avg/embedding.master.*shape \(5, 64\)"),
        ({name: tensor for name, tensor in state.items() if name != first}, "not all of"),
        ({name: tensor for name, tensor in state.items() if "embedding" in name}, "1 of 14 parameters"),
    ):
        with pytest.raises(ValueError, match=message):
            load_optimizer_tensors(policy, wrong.items())
        assert all(torch.equal(state[name], tensor) for name, tensor in optimizer_tensors(policy))
