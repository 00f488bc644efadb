from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from engine import EngineConfig, SamplingParams
from rollout import EpisodeRunner, Observation, RolloutPool
from trainers import (
    GRPOConfig,
    Policy,
    episode_metrics,
    episode_rewards,
    group_advantages,
    pack,
    pack_micro_batches,
    policy_loss,
)
from trainers.batch import pack_tokens
from trainers.grpo_actor import GRPOActor

ROWS = [{"prompt": "the quick brown fox"}, {"prompt": "what is the sum of these numbers?"}, {"prompt": "lazy"}]
PARAMS = SamplingParams(n=4, temperature=0.8, max_tokens=12)


class Talk:
    """Some turns, whose number the seed decides, with observations of every kind; one sample in four fails."""

    def reset(self, row, seed):
        self.random = random.Random(seed)
        self.num_turns = self.random.randrange(1, 5)
        return [{"role": "user", "content": row["prompt"]}]

    def step(self, turn):
        if turn.index == 1 and self.random.random() < 0.4:
            raise ConnectionError("the tool is gone")
        contents = (" = 36\n", [5, 9, 300], [{"role": "user", "content": "there is nothing to see"}])
        return Observation(
            contents[self.random.randrange(3)], reward=self.random.random(), is_done=turn.index + 1 == self.num_turns
        )


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("qwen3"))


@pytest.fixture(scope="module")
def pool(local_ray, model):
    with RolloutPool(EngineConfig(model=model, num_threads=1, num_blocks=512, max_num_batched_tokens=48)) as pool:
        yield pool
        pool.check_integrity()


@pytest.fixture(scope="module")
def groups(pool):
    groups = EpisodeRunner(pool, Talk, PARAMS).run(ROWS)
    assert {r.metadata["ended_by"] for group in groups for r in group} == {"environment", "failure"}
    assert {r.metadata["num_turns"] for group in groups for r in group} > {1, 2}
    return groups


@pytest.fixture(scope="module")
def rollouts(groups):
    return [rollout for group in groups for rollout in group]


@pytest.fixture
def policy(model) -> Policy:
    return Policy(model, num_threads=1)


def num_trained(rollouts) -> int:
    return sum(sum(rollout.loss_mask) for rollout in rollouts)


@pytest.mark.parametrize("share_prompts", [True, False])
def test_the_training_forward_gives_the_logprobs_of_every_turn_bit_for_bit(policy, rollouts, share_prompts):
    batch = pack(rollouts, [1.0] * len(rollouts), share_prompts)
    assert batch.num_targets == num_trained(rollouts) > 100
    assert torch.equal(policy.token_logprobs(batch), batch.rollout_logprobs)


def test_targets_are_the_drawn_tokens_and_rows_hold_all_of_them(rollouts):
    batch = pack(rollouts, [0.0] * len(rollouts))
    whole = [rollout for rollout in rollouts if any(rollout.loss_mask)]
    spans = [r.token_ids[start:end] for r in whole for start, end in r.metadata["turn_spans"]]
    assert batch.target_ids.tolist() == [token_id for span in spans for token_id in span]
    unshared = pack(rollouts, [0.0] * len(rollouts), share_prompts=False)
    assert unshared.num_rows == sum(len(r.prompt_token_ids) + len(r.token_ids) - 1 for r in whole)


def test_micro_batches_change_no_logprob(policy, rollouts):
    batches = pack_micro_batches(rollouts, [1.0] * len(rollouts), max_tokens=150)
    assert len(batches) > 2
    for batch in batches:
        assert torch.equal(policy.token_logprobs(batch), batch.rollout_logprobs)


def test_leaving_observations_out_changes_neither_loss_nor_gradient(policy, rollouts):
    """As if they were targets with a mask of 0, which is what the loss's definition says."""

    def gradients(batch, mask):
        num_tokens = int(mask.sum())
        logprobs = policy.token_logprobs(batch)
        old = torch.where(mask > 0, logprobs.detach() - 0.1, 0.0)
        output = policy_loss(logprobs, old, torch.full_like(mask, 0.5), mask, num_tokens=num_tokens)
        output.loss.backward()
        found = [parameter.grad.clone() for parameter in policy.model.parameters()]
        policy.optimizer.zero_grad()
        return output.loss.detach(), found

    whole = [rollout for rollout in rollouts if any(rollout.loss_mask)]
    batch = pack(whole, [0.5] * len(whole), share_prompts=False)
    every = pack_tokens([r.prompt_token_ids for r in whole], [[r.token_ids] for r in whole])
    mask = torch.tensor([float(flag) for rollout in whole for flag in rollout.loss_mask])
    every_temperature = torch.full_like(every.temperature, PARAMS.temperature)
    loss, found = gradients(batch, batch.loss_mask)
    masked_loss, expected = gradients(replace(every, temperature=every_temperature), mask)
    torch.testing.assert_close(loss, masked_loss)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_a_training_step_measures_drawn_tokens_only_and_is_in_lockstep(model, pool, groups, rollouts):
    trainer = GRPOActor(model, "float32", GRPOConfig(num_threads=1, micro_batch_tokens=150), pool.handle())
    rewards = episode_rewards(groups)
    metrics = trainer.step(rollouts, group_advantages(rewards).flatten().tolist())
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert metrics["mismatch/kl"] == 0.0
    assert metrics["mismatch/num_tokens"] == metrics["actor/num_tokens"] == num_trained(rollouts)
    assert metrics["policy_version"] == 1


def test_the_rewards_of_failed_episodes_are_nan(groups):
    rewards = episode_rewards(groups)
    assert rewards.shape == (3, 4)
    for p, group in enumerate(groups):
        for k, rollout in enumerate(group):
            has_failed = rollout.metadata["ended_by"] == "failure"
            assert rewards[p, k].isnan() == has_failed
            if not has_failed:
                assert rewards[p, k].item() == pytest.approx(sum(rollout.metadata["turn_rewards"]))


def test_metrics_count_turns_tokens_and_ends(rollouts):
    metrics = episode_metrics(rollouts)
    endings = [rollout.metadata["ended_by"] for rollout in rollouts]
    assert metrics["episode/num_failed"] == endings.count("failure") > 0
    assert metrics["episode/num_aborted"] == 0
    assert metrics["episode/truncated_ratio"] == 0.0
    total = metrics["episode/num_drawn_tokens/mean"] + metrics["episode/num_observed_tokens/mean"]
    assert total == pytest.approx(sum(len(r.token_ids) for r in rollouts) / len(rollouts))
    assert metrics["episode/num_turns/max"] == max(rollout.metadata["num_turns"] for rollout in rollouts)


def test_rollouts_of_one_prompt_have_no_episode_reward(make_rollout):
    with pytest.raises(ValueError, match=r"rollout g0\[0\] has no 'reward' in its metadata"):
        episode_rewards([[make_rollout([1], [2])]])
