"""Synchronous GRPO around the public parts: the model learns to answer in seven words."""

import torch

from rollout import EngineConfig, RolloutPool, SamplingParams
from trainers import Policy, group_advantages, pack_micro_batches, policy_loss

MODEL, NUM_STEPS = "smollm2-135m-instruct", 20
TOPICS = ["the sea", "a city at night", "old books", "winter", "a long walk", "bread", "music", "the moon"]
PROMPTS = [[{"role": "user", "content": f"Write one short sentence about {topic}."}] for topic in TOPICS]
PARAMS = SamplingParams(n=8, max_tokens=24)


def reward(text: str) -> float:
    return -abs(len(text.split()) - 7.0)


policy = Policy(MODEL, learning_rate=3e-6)
with RolloutPool(EngineConfig(model=MODEL)) as pool:
    for step in range(NUM_STEPS):
        groups = pool.generate(PROMPTS, PARAMS)
        rewards = torch.tensor([[reward(rollout.text) for rollout in group] for group in groups])
        advantages = group_advantages(rewards)
        rollouts = [rollout for group in groups for rollout in group]
        num_tokens = sum(sum(rollout.loss_mask) for rollout in rollouts)

        def loss_fn(logprobs, batch, num_tokens=num_tokens):
            old, mask = batch.rollout_logprobs, batch.loss_mask
            return policy_loss(logprobs, old, batch.advantages, mask, num_tokens=num_tokens)

        for batch in pack_micro_batches(rollouts, advantages.flatten().tolist(), max_tokens=1024):
            output = policy.forward_backward(batch, loss_fn)
            assert torch.equal(output.logprobs, batch.rollout_logprobs)  # lockstep
        policy.optim_step()
        pool.sync_weights(policy.named_weights(), policy.policy_version)
        print(f"step {step}: reward {rewards.mean():.3f}", flush=True)
