from __future__ import annotations

import itertools
import math

import pytest
import torch

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import Policy, pack, pack_micro_batches, policy_loss
from trainers.batch import pack_tokens
from trainers.losses import LossOutput

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=24, seed=3)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture(scope="module")
def rollouts(model, draw_rollouts):
    engine = LLMEngine(EngineConfig(model=model, num_threads=2))
    groups = draw_rollouts(engine, PROMPTS, PARAMS)
    engine.check_integrity()
    return [rollout for group in groups for rollout in group]


@pytest.fixture
def policy(model) -> Policy:
    return Policy(model, num_threads=1, learning_rate=1e-2, warmup_steps=0)


def advantages_of(rollouts) -> list[float]:
    return [(-1.0) ** i * (1 + i % 3) for i in range(len(rollouts))]


def mean_loss(num_tokens: int):
    def loss_fn(logprobs: torch.Tensor, batch) -> LossOutput:
        return policy_loss(logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, num_tokens=num_tokens)

    return loss_fn


def gradients(policy: Policy, batches) -> list[torch.Tensor]:
    policy.optimizer.zero_grad()
    num_tokens = sum(batch.num_targets for batch in batches)
    for batch in batches:
        policy.forward_backward(batch, mean_loss(num_tokens))
    found = [parameter.grad.clone() for parameter in policy.model.parameters()]
    policy.optimizer.zero_grad()
    return found


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "smollm3"])
def test_the_training_forward_gives_the_engines_logprobs_bit_for_bit(tiny_model_dir, draw_rollouts, family):
    directory = str(tiny_model_dir(family))
    groups = draw_rollouts(LLMEngine(EngineConfig(model=directory, num_threads=1)), PROMPTS, PARAMS)
    policy = Policy(directory, num_threads=2)
    rollouts = [rollout for group in groups for rollout in group]
    batch = pack(rollouts, advantages_of(rollouts))
    output = policy.forward_backward(batch, mean_loss(batch.num_targets))
    assert batch.num_targets > 50
    assert torch.equal(output.logprobs, batch.rollout_logprobs)
    assert output.metrics["actor/ppo_kl"] == 0.0
    assert output.metrics["actor/pg_clipfrac"] == 0.0


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.3])
def test_logprobs_are_those_of_the_tempered_distribution(model, policy, draw_rollouts, temperature):
    params = SamplingParams(n=2, temperature=temperature, max_tokens=8, seed=1)
    groups = draw_rollouts(LLMEngine(EngineConfig(model=model, num_threads=2)), PROMPTS, params)
    batch = pack([rollout for group in groups for rollout in group], [0.0] * 6)
    assert torch.equal(policy.token_logprobs(batch), batch.rollout_logprobs)


def test_shared_prompts_give_the_same_bits_and_close_gradients(policy, rollouts):
    shared = pack(rollouts, advantages_of(rollouts), share_prompts=True)
    unshared = pack(rollouts, advantages_of(rollouts), share_prompts=False)
    assert shared.num_rows < unshared.num_rows
    assert torch.equal(policy.token_logprobs(shared), policy.token_logprobs(unshared))
    for once, repeated in zip(gradients(policy, [shared]), gradients(policy, [unshared]), strict=True):
        assert once.abs().max() > 0
        torch.testing.assert_close(once, repeated, rtol=1e-4, atol=1e-6)


def test_micro_batches_give_the_same_bits_and_close_gradients(policy, rollouts):
    whole = pack(rollouts, advantages_of(rollouts))
    parts = pack_micro_batches(rollouts, advantages_of(rollouts), max_tokens=40)
    assert len(parts) > 3
    assert torch.equal(torch.cat([policy.token_logprobs(part) for part in parts]), policy.token_logprobs(whole))
    for one, many in zip(gradients(policy, [whole]), gradients(policy, parts), strict=True):
        torch.testing.assert_close(many, one, rtol=1e-4, atol=1e-6)


def test_gradients_repeat_bit_for_bit(policy, rollouts):
    batch = pack(rollouts, advantages_of(rollouts))
    for first, second in zip(gradients(policy, [batch]), gradients(policy, [batch]), strict=True):
        assert torch.equal(first, second)


def test_an_optimiser_step_makes_good_samples_likelier(policy, rollouts):
    good = rollouts[:4]
    batch = pack(good, [1.0] * 4)
    before = policy.token_logprobs(batch).sum().item()
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    metrics = policy.optim_step()
    assert policy.policy_version == 1
    assert metrics["actor/grad_norm"] > 0
    assert policy.token_logprobs(batch).sum().item() > before


def test_an_engine_with_the_new_weights_agrees_bit_for_bit(model, policy, rollouts, draw_rollouts):
    batch = pack(rollouts, advantages_of(rollouts))
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    policy.optim_step()
    engine = LLMEngine(EngineConfig(model=model, num_threads=2))
    engine.update_weights(policy.named_weights(), policy.policy_version)
    groups = draw_rollouts(engine, PROMPTS, PARAMS)
    fresh = pack([rollout for group in groups for rollout in group], [0.0] * 12)
    assert torch.equal(policy.token_logprobs(fresh), fresh.rollout_logprobs)
    assert not torch.equal(policy.token_logprobs(batch), batch.rollout_logprobs)  # the old weights' samples


def test_gradients_are_clipped_to_the_norm(model, rollouts):
    policy = Policy(model, num_threads=1, learning_rate=1e-3, max_grad_norm=1e-3)
    batch = pack(rollouts, advantages_of(rollouts))
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    before = math.sqrt(sum(p.grad.double().square().sum().item() for p in policy.model.parameters()))
    assert policy.optim_step()["actor/grad_norm"] == pytest.approx(before, rel=1e-5)
    assert before > 1e-3


def test_the_learning_rate_warms_up_linearly(model, rollouts):
    policy = Policy(model, num_threads=1, learning_rate=3e-4, warmup_steps=3)
    batch = pack(rollouts[:1], [1.0])
    rates = []
    for _ in range(5):
        policy.forward_backward(batch, mean_loss(batch.num_targets))
        rates.append(policy.optim_step()["actor/lr"])
    assert rates == pytest.approx([1e-4, 2e-4, 3e-4, 3e-4, 3e-4])


def test_gradients_that_are_not_finite_leave_the_weights_alone(policy, rollouts):
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    batch = pack(rollouts[:1], [math.nan])
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    with pytest.raises(FloatingPointError, match="gradient norm nan at update 0"):
        policy.optim_step()
    assert policy.policy_version == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.named_weights())


def test_probabilities_of_single_token_continuations_stay_below_one(policy):
    texts = [policy.tokenizer.decode([token_id]) for token_id in range(len(policy.tokenizer))]
    reachable = [t for i, t in enumerate(texts) if policy.tokenizer.encode(t, add_special_tokens=False) == [i]]
    assert len(reachable) > 150
    assert 0.1 < policy.expected_reward(["what is it? "], [reachable]) <= 1.0 + 1e-6


def test_expected_reward_is_the_product_of_token_probabilities(policy):
    prompt, answer = "7 + 5 =", " 12\n"
    prompt_ids = policy.tokenizer.encode(prompt)
    answer_ids = policy.tokenizer.encode(answer, add_special_tokens=False)
    assert len(answer_ids) > 1
    probability = 1.0
    for end in range(len(answer_ids)):
        batch_ids = prompt_ids + answer_ids[:end]
        batch = pack_tokens([batch_ids], [[[answer_ids[end]]]])
        probability *= policy.token_logprobs(batch).double().exp().item()
    assert policy.expected_reward([prompt], [answer]) == pytest.approx(probability, rel=1e-9)


def test_expected_reward_averages_prompts_and_adds_up_alternatives(policy):
    prompts, answers = ["1 + 1 =", "2 + 30 =", "4 ="], [" 2\n", [" 32\n", "32\n"], " 4\n"]
    singles = [
        policy.expected_reward(["1 + 1 ="], [" 2\n"]),
        policy.expected_reward(["2 + 30 ="], [" 32\n"]) + policy.expected_reward(["2 + 30 ="], ["32\n"]),
        policy.expected_reward(["4 ="], [" 4\n"]),
    ]
    whole = policy.expected_reward(prompts, answers)
    assert whole == pytest.approx(sum(singles) / 3, rel=1e-12)
    assert all(policy.expected_reward(prompts, answers, max_tokens=n) == pytest.approx(whole) for n in (1, 20))


def test_expected_reward_is_the_share_of_right_samples(model, policy):
    """The exact figure against the engine: 2000 samples of one token."""
    engine = LLMEngine(EngineConfig(model=model, num_threads=2))
    (samples,) = engine.generate(["it is "], SamplingParams(n=250, max_tokens=1, seed=1))
    text = policy.tokenizer.decode(
        [max((c.token_ids[0] for c in samples), key=[c.token_ids[0] for c in samples].count)]
    )
    (answer_id,) = policy.tokenizer.encode(text, add_special_tokens=False)
    draws = itertools.chain.from_iterable(
        engine.generate(["it is "], SamplingParams(n=250, max_tokens=1, seed=seed))[0] for seed in range(8)
    )
    share = sum(c.token_ids == [answer_id] for c in draws) / 2000
    exact = policy.expected_reward(["it is "], [text])
    assert abs(share - exact) < 4 * math.sqrt(exact * (1 - exact) / 2000)


def test_wrong_answers_are_named(policy):
    with pytest.raises(ValueError, match="2 prompts with 1 answers"):
        policy.expected_reward(["a", "b"], ["c"])
    with pytest.raises(ValueError, match="at least one token"):
        policy.expected_reward(["a"], [""])


def test_saved_weights_are_the_policys(tmp_path, policy, rollouts):
    batch = pack(rollouts[:4], [1.0, -1.0, 2.0, 0.5])
    policy.forward_backward(batch, mean_loss(batch.num_targets))
    policy.optim_step()
    policy.save_pretrained(tmp_path / "weights")
    saved = Policy(str(tmp_path / "weights"), num_threads=1)
    assert torch.equal(saved.token_logprobs(batch), policy.token_logprobs(batch))
    assert saved.tokenizer.encode("what is it") == policy.tokenizer.encode("what is it")
