"""Asynchronous GRPO: the engine draws while the policy trains, on tokens that are at most one version old."""

from itertools import cycle

import torch

from rollout import EngineConfig, RolloutPool, SamplingParams
from trainers import Policy, group_advantages, pack, policy_loss

MODEL, NUM_STEPS = "smollm2-135m-instruct", 20
TOPICS = ["the sea", "a city at night", "old books", "winter", "a long walk", "bread", "music", "the moon"]
PROMPTS = cycle([{"role": "user", "content": f"Write one short sentence about {topic}."}] for topic in TOPICS)
PARAMS = SamplingParams(n=8, max_tokens=24)
GROUPS_PER_STEP = 4


def reward(text):
    return -abs(len(text.split()) - 7.0)


def loss_fn(logprobs, batch):  # the ratio to the version that drew a token makes up for its age
    old, mask = batch.rollout_logprobs, batch.loss_mask
    return policy_loss(logprobs, old, batch.advantages, mask, num_tokens=batch.num_targets)


policy = Policy(MODEL, learning_rate=3e-6)
with RolloutPool(EngineConfig(model=MODEL), max_staleness=1, groups_per_version=GROUPS_PER_STEP) as pool:
    for step in range(NUM_STEPS):
        while pool.has_capacity():
            pool.submit([next(PROMPTS)], PARAMS)
        groups = pool.collect(GROUPS_PER_STEP)
        rewards = torch.tensor([[reward(rollout.text) for rollout in group] for group in groups])
        rollouts = [rollout for group in groups for rollout in group]
        batch = pack(rollouts, group_advantages(rewards).flatten().tolist())
        output = policy.forward_backward(batch, loss_fn)
        versions = torch.tensor([version for rollout in rollouts for version in rollout.policy_versions])
        fresh = versions == policy.policy_version
        assert output.logprobs[fresh].equal(batch.rollout_logprobs[fresh])  # lockstep
        policy.optim_step()
        pool.sync_weights(policy.named_weights(), policy.policy_version)  # what runs goes on under the new weights
        print(f"step {step}: reward {rewards.mean():.3f}, {fresh.float().mean():.0%} of tokens fresh", flush=True)
