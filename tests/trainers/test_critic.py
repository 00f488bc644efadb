from __future__ import annotations

import pytest
import torch

from kernels import set_num_threads
from trainers import pack, pack_micro_batches
from trainers.critic import Critic

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
COMPLETIONS = [[6, 7, 8], [9, 10], [11], [12, 13, 14, 15]]


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def rollouts(make_rollout):
    return [
        make_rollout(prompt, token_ids, group_id=f"g{p}", index=i)
        for p, prompt in enumerate(PROMPTS)
        for i, token_ids in enumerate(COMPLETIONS)
    ]


def make_critic(model: str, **changes) -> Critic:
    """One whose head tells hidden states apart."""
    critic = Critic(model, **({"learning_rate": 1e-3} | changes))
    torch.manual_seed(0)
    critic.load_weights({**dict(critic.named_weights()), "score.weight": torch.randn(1, critic.model.head.num_inputs)})
    return critic


def learn(critic: Critic, batch, returns: torch.Tensor, num_updates: int) -> list[float]:
    old_values, losses = critic.values(batch), []
    for _ in range(num_updates):
        output = critic.forward_backward(batch, old_values, returns, num_tokens=batch.num_targets)
        losses.append(output.metrics["critic/vf_loss"])
        critic.optim_step()
    return losses


def test_values_are_exactly_zero_before_the_first_update(model, rollouts):
    values = Critic(model).values(pack(rollouts, [0.0] * len(rollouts)))
    assert values.dtype is torch.float32
    assert values.tolist() == [0.0] * sum(len(one.token_ids) for one in rollouts)


@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_values_are_the_same_bits_however_samples_are_packed(model, rollouts, numerics):
    critic, zeros = make_critic(model, numerics=numerics), [0.0] * len(rollouts)
    set_num_threads(2)
    whole = critic.values(pack(rollouts, zeros))
    set_num_threads(1)
    parts = [critic.values(batch) for batch in pack_micro_batches(rollouts, zeros, 16)]
    alone = critic.values(pack(rollouts, zeros, share_prompts=False))
    assert len(parts) > 3
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(alone, whole)
    assert whole.unique().numel() > 20


def test_a_value_is_that_of_the_state_before_its_token(model, rollouts):
    """It sees the tokens before, not its own: samples of a prompt begin with one value."""
    critic = make_critic(model)
    values = critic.values(pack(rollouts[:4], [0.0] * 4)).split([len(token_ids) for token_ids in COMPLETIONS])
    assert len({of_sample[0].item() for of_sample in values}) == 1
    assert values[0][1] != values[3][1]


def test_the_critic_learns_returns(model, rollouts):
    batch = pack(rollouts, [0.0] * len(rollouts))
    returns = (batch.target_ids % 3).float()
    losses = learn(Critic(model, learning_rate=3e-3, head_learning_rate=1e-2), batch, returns, 30)
    assert losses[0] == pytest.approx(0.5 * returns.square().mean().item())
    assert losses[-1] < 0.5 * losses[0]


def test_the_trunk_learns_as_well_as_the_head(model, rollouts):
    critic, batch = Critic(model), pack(rollouts, [0.0] * len(rollouts))
    before = {name: tensor.clone() for name, tensor in critic.named_weights()}
    learn(critic, batch, torch.ones(batch.num_targets), 2)
    moved = {name for name, tensor in critic.named_weights() if not torch.equal(before[name], tensor)}
    assert {"score.weight", "score.bias", "model.norm.weight", "model.layers.0.self_attn.q_proj.weight"} <= moved


def test_the_head_has_a_learning_rate_of_its_own(model, rollouts):
    critic, batch = Critic(model, learning_rate=1e-5, head_learning_rate=1e-2), pack(rollouts, [0.0] * len(rollouts))
    before = {name: tensor.clone() for name, tensor in critic.named_weights()}
    learn(critic, batch, torch.ones(batch.num_targets), 2)
    after = dict(critic.named_weights())
    assert (after["score.weight"] - before["score.weight"]).abs().max() > 1e-3
    assert (after["model.norm.weight"] - before["model.norm.weight"]).abs().max() < 1e-4


def test_gradients_of_micro_batches_add_up(model, rollouts):
    critic, zeros = make_critic(model), [0.0] * len(rollouts)
    norms = []
    for max_tokens in (16, 4096):
        batches = pack_micro_batches(rollouts, zeros, max_tokens)
        num_tokens = sum(batch.num_targets for batch in batches)
        for batch in batches:
            critic.forward_backward(batch, critic.values(batch), torch.ones(batch.num_targets), num_tokens=num_tokens)
        norms.append(torch.stack([p.grad.norm() for p in critic.model.parameters() if p.grad is not None]).norm())
        critic.optimizer.zero_grad()
    assert norms[0] == pytest.approx(norms[1].item(), rel=1e-4)


def test_weights_go_from_one_critic_to_another_to_the_bit(model, rollouts):
    batch = pack(rollouts, [0.0] * len(rollouts))
    critic = make_critic(model)
    learn(critic, batch, torch.ones(batch.num_targets), 2)
    other = Critic(model)
    other.load_weights({name: tensor.clone() for name, tensor in critic.named_weights()})
    assert torch.equal(other.values(batch), critic.values(batch))


def test_weights_of_another_critic_are_refused_and_nothing_is_written(model, rollouts):
    critic, batch = make_critic(model), pack(rollouts, [0.0] * len(rollouts))
    before, weights = critic.values(batch), dict(critic.named_weights())
    with pytest.raises(ValueError, match=r"weight 'score.bias' of the critic is missing"):
        critic.load_weights({name: tensor for name, tensor in weights.items() if name != "score.bias"})
    with pytest.raises(ValueError, match=r"'score.weight' of the critic is of shape \(2, 2\); needed: .* \(1, "):
        critic.load_weights(weights | {"score.weight": torch.zeros(2, 2)})
    with pytest.raises(ValueError, match=r"unknown model\.extra"):
        critic.load_weights(weights | {"model.extra": torch.zeros(2), "score.bias": torch.ones(1)})
    assert torch.equal(critic.values(batch), before)
