from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import Policy, pack, policy_loss

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
SETTINGS = {"learning_rate": 1e-2, "weight_decay": 0.1, "learning_rate_schedule": "cosine", "num_optimizer_steps": 8}
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


@pytest.fixture(scope="module")
def rollouts(tiny_model_dir, draw_rollouts):
    engine = LLMEngine(EngineConfig(model=str(tiny_model_dir("llama")), num_threads=2))
    return [r for group in draw_rollouts(engine, PROMPTS, SamplingParams(n=4, max_tokens=24, seed=3)) for r in group]


def trained(policy: Policy, rollouts, num_steps: int) -> list[dict[str, float]]:
    """Updates on batches that depend on the policy's version alone."""
    metrics = []
    for _ in range(num_steps):
        batch = pack(rollouts, [(-1.0) ** (i + policy.policy_version) * (1 + i % 3) for i in range(len(rollouts))])
        policy.forward_backward(batch, loss)
        metrics.append(policy.optim_step())
    return metrics


def loss(logprobs, batch):
    return policy_loss(
        logprobs, batch.rollout_logprobs, batch.advantages, batch.loss_mask, num_tokens=batch.num_targets
    )


def everything(policy: Policy) -> dict[str, torch.Tensor]:
    state = policy.optimizer.optimizer.state
    moments = {
        f"{name}.{entry}": value
        for name, parameter in policy.model.named_parameters()
        for entry, value in state[parameter].items()
    }
    return dict(policy.named_weights()) | moments


@pytest.mark.parametrize(("family", "num_threads"), [("llama", 1), ("qwen2", 2), ("smollm3", 1)])
@pytest.mark.parametrize("numerics", ["float32", "bfloat16"])
def test_steps_saved_and_gone_on_with_are_those_of_one_policy(
    tmp_path, tiny_model_dir, rollouts, family, num_threads, numerics
):
    model = str(tiny_model_dir(family, tie_word_embeddings=family != "qwen2"))
    whole = Policy(model, numerics=numerics, num_threads=2, **SETTINGS)
    metrics = trained(whole, rollouts, 6)

    first = Policy(model, numerics=numerics, num_threads=num_threads, **SETTINGS)
    trained(first, rollouts, 3)
    first.save_checkpoint(tmp_path)
    second = Policy(model, numerics=numerics, num_threads=num_threads, **SETTINGS)
    second.load_checkpoint(tmp_path)
    assert second.policy_version == 3
    assert trained(second, rollouts, 3) == metrics[3:]
    for name, tensor in everything(whole).items():
        assert torch.equal(everything(second)[name], tensor), name


def test_a_policy_that_was_never_updated_is_saved_too(tmp_path, tiny_model_dir, rollouts):
    model = str(tiny_model_dir("llama"))
    Policy(model, num_threads=1, **SETTINGS).save_checkpoint(tmp_path)
    loaded = Policy(model, num_threads=1, **SETTINGS)
    trained(loaded, rollouts, 1)
    loaded.load_checkpoint(tmp_path)
    assert loaded.policy_version == 0
    assert trained(loaded, rollouts, 2) == trained(Policy(model, num_threads=1, **SETTINGS), rollouts, 2)


def test_the_size_is_known_beforehand(tmp_path, tiny_model_dir, rollouts):
    policy = Policy(str(tiny_model_dir("llama")), num_threads=1)
    trained(policy, rollouts, 1)
    policy.save_checkpoint(tmp_path)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    assert policy.checkpoint_num_bytes() <= size < policy.checkpoint_num_bytes() + 20_000


def test_another_models_state_is_refused(tmp_path, tiny_model_dir, rollouts):
    policy = Policy(str(tiny_model_dir("llama")), num_threads=1)
    trained(policy, rollouts, 1)
    policy.save_checkpoint(tmp_path)
    with pytest.raises(ValueError, match="weights do not fit"):
        Policy(str(tiny_model_dir("qwen3")), num_threads=1).load_checkpoint(tmp_path)
    path = tmp_path / "optimizer.safetensors"
    tensors = load_file(path)
    save_file({name.replace("norm", "mean"): tensor for name, tensor in tensors.items()}, path, {"policy_version": "1"})
    with pytest.raises(ValueError, match=r"tensors of other parameters, such as '.*mean"):
        policy.load_checkpoint(tmp_path)
    save_file({name: tensor.flatten() for name, tensor in tensors.items()}, path, {"policy_version": "1"})
    with pytest.raises(ValueError, match="has the shape"):
        policy.load_checkpoint(tmp_path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match=r"not a readable optimiser file.*num_updates"):
        policy.load_checkpoint(tmp_path)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "smollm3"])
def test_the_checkpoints_model_opens_in_transformers_and_writes_what_our_engine_writes(
    tmp_path, tiny_model_dir, rollouts, family
):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = Policy(str(tiny_model_dir(family)), num_threads=2, learning_rate=1e-2)
    trained(policy, rollouts, 3)
    policy.save_checkpoint(tmp_path)
    directory = tmp_path / "model"
    engine = LLMEngine(EngineConfig(model=str(directory), num_threads=2))
    ours = [group[0].token_ids for group in engine.generate(PROMPTS, GREEDY)]
    engine.check_integrity()

    model = AutoModelForCausalLM.from_pretrained(directory)
    assert model.dtype == torch.float32
    ids = [torch.tensor([prompt]) for prompt in PROMPTS]
    written = [model.generate(i, max_new_tokens=24, do_sample=False)[0, i.shape[1] :].tolist() for i in ids]
    assert written == ours
    assert any(len(set(token_ids)) > 3 for token_ids in ours)
    assert AutoTokenizer.from_pretrained(directory).encode("what is it") == policy.tokenizer.encode("what is it")
