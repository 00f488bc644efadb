"""Trainers on the GPU's kernels: by Triton's interpreter here, on the device with `python -m scripts.gpu_check`."""

from __future__ import annotations

import pytest
import torch
from one_engine import OneEngine

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import Critic, GRPOConfig, GRPOTrainer, Policy, PPOConfig, pack, policy_loss
from trainers.grpo_actor import GRPOActor
from trainers.ppo_actor import PPOActor

PROMPTS = [[5, 9, 11, 30], [7, 40]]
PARAMS = SamplingParams(n=2, temperature=0.8, max_tokens=3, seed=3, ignore_eos=True)
ADVANTAGES = [1.0, -1.0, 2.0, -2.0]
SETTINGS = {"num_threads": 1, "learning_rate": 1e-2, "warmup_steps": 0}

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU")


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("qwen3", num_hidden_layers=1))  # with head norms and a tied head


def interpreted_engine(model: str, numerics: str) -> LLMEngine:
    return LLMEngine(
        EngineConfig(model, device="interpreter", numerics=numerics, num_blocks=16, max_num_seqs=4, max_model_len=64)
    )


@pytest.fixture(scope="module")
def engine(model) -> LLMEngine:
    return interpreted_engine(model, "float32")


@pytest.fixture(scope="module")
def rollouts(engine, draw_rollouts):
    return [rollout for group in draw_rollouts(engine, PROMPTS, PARAMS) for rollout in group]


def interpreted(model: str, **options) -> Policy:
    return Policy(model, **({"numerics": "float32", "device": "interpreter"} | SETTINGS | options))


def loss(logprobs, batch):
    num_tokens = batch.num_targets
    return policy_loss(logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, num_tokens=num_tokens)


def gradients(policy: Policy, batch) -> dict[str, torch.Tensor]:
    policy.forward_backward(batch, loss)
    found = {name: parameter.grad.clone() for name, parameter in policy.model.named_parameters()}
    policy.optimizer.zero_grad()
    return found


def learned(policy: Policy, batch) -> dict[str, float]:
    policy.forward_backward(batch, loss)
    return policy.optim_step()


def by_place(completions, **columns) -> list[float]:
    return [float(place) for place, _ in enumerate(completions)]


def test_gradients_are_near_those_of_the_cpu_and_repeat(model, rollouts):
    batch, ours = pack(rollouts, ADVANTAGES), interpreted(model)
    found, again = gradients(ours, batch), gradients(ours, batch)
    for name, expected in gradients(Policy(model, numerics="float32", **SETTINGS), batch).items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5)
        assert torch.equal(again[name], found[name]), name


@pytest.mark.parametrize("numerics", ["float32", pytest.param("auto", marks=pytest.mark.slow)])
def test_engine_and_policy_agree_bit_for_bit_before_and_after_an_update(model, draw_rollouts, numerics):
    engine, policy = interpreted_engine(model, numerics), interpreted(model, numerics=numerics)
    assert policy.kernel_fingerprint == engine.kernel_fingerprint
    before = {name: tensor.clone() for name, tensor in policy.named_weights()}
    for version in range(2):
        groups = draw_rollouts(engine, PROMPTS, PARAMS)
        batch = pack([rollout for group in groups for rollout in group], ADVANTAGES)
        assert set(batch.policy_versions.tolist()) == {version}
        output = policy.forward_backward(batch, loss)
        assert torch.equal(output.logprobs, batch.rollout_logprobs)
        policy.optim_step()
        engine.update_weights(policy.named_weights(), policy.policy_version)
        engine.check_integrity()
    assert all(not torch.equal(tensor, before[name]) for name, tensor in policy.named_weights())


def test_a_checkpoint_goes_on_to_the_same_bits_and_opens_on_the_cpu(model, rollouts, tmp_path):
    batch, first = pack(rollouts, ADVANTAGES), interpreted(model)
    learned(first, batch)
    first.save_checkpoint(tmp_path)
    second, on_cpu = interpreted(model), Policy(model, numerics="float32", **SETTINGS)
    second.load_checkpoint(tmp_path)
    on_cpu.load_checkpoint(tmp_path)
    saved = dict(first.named_weights())
    assert all(torch.equal(saved[name], tensor) for name, tensor in on_cpu.named_weights())
    torch.testing.assert_close(on_cpu.token_logprobs(batch), second.token_logprobs(batch), rtol=1e-4, atol=1e-5)
    assert learned(second, batch) == learned(first, batch)
    after = dict(second.named_weights())
    assert all(torch.equal(after[name], tensor) for name, tensor in first.named_weights())


def test_a_critic_learns_and_its_values_are_near_those_of_the_cpu(model, rollouts):
    batch = pack(rollouts, ADVANTAGES)
    returns, values = torch.ones(batch.num_targets), []
    for device in ("interpreter", "cpu"):
        critic = Critic(model, numerics="float32", device=device, learning_rate=1e-2)
        before = critic.values(batch)
        assert before.device.type == "cpu"
        assert before.tolist() == [0.0] * batch.num_targets
        critic.forward_backward(batch, before, returns, num_tokens=batch.num_targets)
        critic.optim_step()
        values.append(critic.values(batch))
    assert values[0].abs().max() > 0
    torch.testing.assert_close(values[0], values[1], rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_reference_and_older_versions_are_compared_on_the_device_too(model, draw_rollouts, tmp_path):
    config = GRPOConfig(
        **SETTINGS, max_tokens=3, mode="lagged", kl_coef=0.1, reference_update_every=1, gradient_checkpointing=True
    )
    engine = interpreted_engine(model, "float32")
    trainer = GRPOActor(model, "float32", config, OneEngine(engine), "interpreter")
    old = [rollout for group in draw_rollouts(engine, PROMPTS, PARAMS) for rollout in group]
    for num_stale_tokens in (0, 12):
        metrics = trainer.step(old, ADVANTAGES)
        assert metrics["mismatch/num_stale_tokens"] == num_stale_tokens
        assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    facts = trainer.save_checkpoint(str(tmp_path))
    GRPOActor(model, "float32", config, OneEngine(engine), "interpreter").load_checkpoint(str(tmp_path), facts)


@pytest.mark.slow
def test_ppos_first_ratio_is_one(model, rollouts, engine):
    config = PPOConfig(**SETTINGS, max_tokens=3, num_epochs=1, num_minibatches=1, num_prompts=2, group_size=2)
    metrics, _ = PPOActor(model, "float32", config, OneEngine(engine), "interpreter").step(rollouts, ADVANTAGES)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert metrics["actor/first_ratio_abs_diff_max"] == 0.0


@pytest.mark.slow
def test_a_run_trains_on_the_device_of_its_engines(local_ray, model):
    config = GRPOConfig(**SETTINGS, num_steps=2, num_prompts=1, group_size=2, max_tokens=2, stop=(), reward_processes=0)
    engine_config = EngineConfig(model, device="interpreter", numerics="float32", num_blocks=16, max_model_len=64)
    trainer = GRPOTrainer(config, engine_config, [{"prompt": PROMPTS[0]}], by_place)
    steps = trainer.train()[1:]
    assert trainer.environment["trainer"]["profile"] == "gpu-float32"
    assert [metrics["policy_version"] for metrics in steps] == [1, 2]
    assert [metrics["mismatch/num_tokens"] for metrics in steps] == [4, 4]
    assert [metrics["mismatch/logprob_abs_diff_max"] for metrics in steps] == [0.0, 0.0]


@pytest.mark.parametrize("make", [Policy, Critic])
def test_devices_that_are_not_there_and_numerics_that_they_lack_are_refused(model, make):
    with pytest.raises(ValueError, match=r"^device='cuda' is not available: torch finds no CUDA device"):
        make(model, device="cuda")
    with pytest.raises(ValueError, match=r"^numerics='bfloat16-dot' is a profile of the CPU: on device='interpreter'"):
        make(model, numerics="bfloat16-dot", device="interpreter")
    with pytest.raises(ValueError, match=r"^device='tpu' is not available in this version: use 'auto' or 'cpu'"):
        make(model, device="tpu")


def test_several_ranks_train_on_the_cpu_only(tiny_model_dir):
    engine_config = EngineConfig(str(tiny_model_dir("llama")), device="interpreter")
    with pytest.raises(ValueError, match=r"^num_trainer_ranks=2 train on the CPU only so far, not on device='interp"):
        GRPOTrainer(GRPOConfig(num_trainer_ranks=2), engine_config, [{"prompt": "1"}], lambda **_: [0.0])
