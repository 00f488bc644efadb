from __future__ import annotations

import dataclasses

import pytest
import torch
from one_engine import OneEngine

from engine import EngineConfig, LLMEngine, SamplingParams
from trainers import ALGORITHMS, GRPOConfig, correction_weights, pack
from trainers.grpo_actor import GRPOActor

PROMPTS = [[5, 9, 11, 30], [7], list(range(40, 90))]
PARAMS = SamplingParams(n=4, temperature=1.0, max_tokens=12, seed=3)
CONFIG = GRPOConfig(learning_rate=1e-3, warmup_steps=0, micro_batch_tokens=64, max_tokens=12, num_threads=1)


@pytest.fixture(scope="module")
def model(tiny_model_dir) -> str:
    return str(tiny_model_dir("llama"))


@pytest.fixture
def engine(model) -> LLMEngine:
    return LLMEngine(EngineConfig(model=model, num_threads=2))


@pytest.fixture
def start(model, engine):
    return lambda **changes: GRPOActor(model, "float32", dataclasses.replace(CONFIG, **changes), OneEngine(engine))


@pytest.fixture
def draw(engine, draw_rollouts):
    return lambda: [rollout for group in draw_rollouts(engine, PROMPTS, PARAMS) for rollout in group]


def advantages_of(rollouts) -> list[float]:
    return [(-1.0) ** i for i in range(len(rollouts))]


def test_mismatch_is_exactly_zero_on_every_token_of_every_step(start, draw):
    trainer = start()
    for version in range(1, 4):
        rollouts = draw()
        metrics = trainer.step(rollouts, advantages_of(rollouts))
        assert metrics["policy_version"] == version
        assert metrics["mismatch/num_tokens"] == sum(len(r.token_ids) for r in rollouts)
        assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
        assert metrics["mismatch/kl"] == 0.0
        assert metrics["actor/pg_clipfrac"] == 0.0
        assert metrics["actor/grad_norm"] > 0
        trainer.sync()


def test_samples_of_a_part_of_the_distribution_agree_to_the_bit_and_are_weighted(start, engine, draw_rollouts):
    params = dataclasses.replace(PARAMS, top_p=0.7, top_k=40)
    rollouts = [rollout for group in draw_rollouts(engine, PROMPTS, params) for rollout in group]
    metrics = start(top_p=0.7, top_k=40).step(rollouts, advantages_of(rollouts))
    assert metrics["mismatch/num_tokens"] == sum(len(r.token_ids) for r in rollouts)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    kept = [mass for r in rollouts for mass in r.kept_mass]
    assert metrics["correction/kept_mass_mean"] == pytest.approx(sum(kept) / len(kept))
    assert 0.5 < metrics["correction/kept_mass_mean"] < 0.95
    assert metrics["actor/pg_clipfrac"] == 0.0
    with pytest.raises(ValueError, match=r"drawn from a part of the distribution.*give it the top_p"):
        start().step(rollouts, advantages_of(rollouts))


def test_a_wrong_logprob_shows_as_mismatch(start, draw):
    rollouts = draw()
    logprobs = list(rollouts[3].logprobs)
    logprobs[0] += 2**-10
    rollouts[3] = dataclasses.replace(rollouts[3], logprobs=logprobs)
    metrics = start().step(rollouts, advantages_of(rollouts))
    assert metrics["mismatch/logprob_abs_diff_max"] == pytest.approx(2**-10, rel=1e-3)


def test_nothing_to_train_on_rests_the_optimiser(start, draw):
    trainer = start()
    before = {name: tensor.clone() for name, tensor in trainer.policy.named_weights()}
    metrics = trainer.step([], [])
    assert metrics["actor/num_skipped_steps"] == 1
    assert metrics["policy_version"] == 0
    assert metrics["mismatch/num_tokens"] == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in trainer.policy.named_weights())


def test_checked_rollouts_are_compared_but_not_trained(start, draw):
    rollouts = draw()
    metrics = start().step(rollouts[:4], [1.0, -1.0, 1.0, -1.0], checked=rollouts[4:])
    assert metrics["mismatch/num_tokens"] == sum(len(r.token_ids) for r in rollouts)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert metrics["actor/num_tokens"] == sum(len(r.token_ids) for r in rollouts[:4])


def test_tokens_that_the_engine_did_not_draw_are_not_compared(start, draw):
    rollouts = draw()
    first = rollouts[0]
    rollouts[0] = dataclasses.replace(
        first, loss_mask=[0] + [1] * (len(first.token_ids) - 1), logprobs=[0.0, *first.logprobs[1:]]
    )
    metrics = start().step(rollouts, advantages_of(rollouts))
    assert metrics["mismatch/num_tokens"] == sum(len(r.token_ids) for r in rollouts) - 1
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0


def test_later_iterations_clip_but_the_mismatch_stays_that_of_the_first(start, draw):
    rollouts = draw()
    metrics = start(num_iterations=3, learning_rate=3e-2).step(rollouts, advantages_of(rollouts))
    assert metrics["policy_version"] == 1  # the weights in between are nobody's
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    assert metrics["actor/pg_clipfrac"] > 0.0
    assert metrics["actor/ppo_kl"] != 0.0


def test_the_kl_to_the_first_model_is_zero_at_first_and_grows(start, draw):
    trainer = start(kl_coef=0.1, learning_rate=1e-2)
    rollouts = draw()
    assert trainer.step(rollouts, advantages_of(rollouts))["actor/kl_loss"] == 0.0
    trainer.sync()
    rollouts = draw()
    assert trainer.step(rollouts, advantages_of(rollouts))["actor/kl_loss"] > 0.0


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_starts_in_lockstep_and_raises_what_is_rewarded(start, draw, name):
    config = GRPOConfig.for_algorithm(name)
    settings = {field: getattr(config, field) for field in ALGORITHMS[name].settings}
    trainer = start(**settings, learning_rate=3e-3, num_iterations=3)
    rollouts = draw()
    before = sample_logprobs(trainer, rollouts)
    metrics = trainer.step(rollouts, advantages_of(rollouts))
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    gain = sample_logprobs(trainer, rollouts) - before
    assert gain[::2].mean() > gain[1::2].mean()


def sample_logprobs(trainer, rollouts) -> torch.Tensor:
    """The mean log-probability of each sample's tokens under the policy as it is now."""
    batch = pack(rollouts, [0.0] * len(rollouts))
    with torch.no_grad():
        logprobs = trainer.policy.token_logprobs(batch)
    return torch.stack([logprobs[batch.sample_index == i].mean() for i in range(len(rollouts))])


def test_kl_in_the_reward_is_zero_at_first_and_then_a_penalty(start, draw):
    trainer = start(kl_coef=0.1, kl_in="reward", kl_estimator="k2", learning_rate=1e-2)
    rollouts = draw()
    metrics = trainer.step(rollouts, advantages_of(rollouts))
    assert metrics["actor/reward_kl_penalty"] == 0.0
    assert "actor/kl_loss" not in metrics
    trainer.sync()
    rollouts = draw()
    assert trainer.step(rollouts, advantages_of(rollouts))["actor/reward_kl_penalty"] > 0.0


def test_a_reference_that_follows_at_once_leaves_no_kl(start, draw):
    moving = {"reference_update_every": 2, "reference_mixup": 1.0}
    trainer = start(kl_coef=0.1, learning_rate=1e-2, **moving)
    kls = []
    for _ in range(3):
        rollouts = draw()
        kls.append(trainer.step(rollouts, advantages_of(rollouts))["actor/kl_loss"])
        trainer.sync()
    assert kls[0] == 0.0
    assert kls[1] > 0.0
    assert kls[2] == 0.0  # after two updates the policy and its reference are the same bits


def test_a_mixed_reference_stands_between_the_first_model_and_the_policy(start, draw):
    trainer = start(kl_coef=0.1, learning_rate=1e-2, reference_update_every=1, reference_mixup=0.25)
    first = {name: tensor.clone() for name, tensor in trainer.policy.named_weights()}
    rollouts = draw()
    trainer.step(rollouts, advantages_of(rollouts))
    policy = dict(trainer.policy.named_weights())
    for name, tensor in trainer.reference.model.named_weights():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * policy[name], rtol=1e-5, atol=1e-7)


def test_stale_rollouts_are_held_against_the_policy_before_its_update_and_weighed(start, draw):
    trainer = start(learning_rate=1e-2)
    rollouts = draw()
    batches = [pack(rollouts, advantages_of(rollouts))]
    (fresh,), metrics = trainer._targets(batches, rollouts, None)
    assert fresh.correction is None
    assert torch.equal(fresh.old_logprobs, batches[0].rollout_logprobs)
    assert metrics == {}

    trainer.step(rollouts, advantages_of(rollouts))  # they are one version behind now
    (stale,), metrics = trainer._targets(batches, rollouts, None)
    with torch.no_grad():
        assert torch.equal(stale.old_logprobs, trainer.policy.token_logprobs(batches[0]))
    behaviour, mask = batches[0].rollout_logprobs, batches[0].loss_mask
    expected = correction_weights(stale.old_logprobs, behaviour, mask, batches[0].sample_index)
    assert torch.equal(stale.correction, expected)
    assert 0.0 < metrics["correction/effective_sample_size"] < 1.0


def test_micro_batches_do_not_change_the_figures(start, draw):
    rollouts = draw()
    small = start(micro_batch_tokens=16).step(rollouts, advantages_of(rollouts))
    large = start(micro_batch_tokens=4096).step(rollouts, advantages_of(rollouts))
    for name in ("actor/pg_loss", "actor/entropy", "actor/grad_norm"):
        assert small[name] == pytest.approx(large[name], rel=1e-4, abs=1e-6)


def test_other_kernels_are_refused(start, draw):
    rollouts = draw()
    rollouts[2] = dataclasses.replace(rollouts[2], kernel_fingerprint="another")
    with pytest.raises(ValueError, match=r"g0\[2\].*fingerprint another"):
        start().step(rollouts, advantages_of(rollouts))


def test_stale_rollouts_are_refused(start, draw):
    trainer = start()
    rollouts = draw()
    trainer.step(rollouts, advantages_of(rollouts))
    with pytest.raises(ValueError, match=r"versions \[0\], the trainer is at 1 and takes those at most 0 behind it"):
        trainer.step(rollouts, advantages_of(rollouts))


def test_tokens_of_an_older_version_are_compared_under_its_weights(start, engine, make_rollout):
    """Samples that run across an update, which comes in the middle of their tokens."""
    trainer = start(mode="async", max_staleness=1)
    for i, prompt in enumerate(PROMPTS):
        engine.add_request(str(i), prompt, dataclasses.replace(PARAMS, ignore_eos=True))
    completions = [completion for _ in range(5) for completion in engine.step().finished]
    others = [make_rollout([5], [6, 7], kernel_fingerprint=engine.kernel_fingerprint)] * 2
    assert trainer.step(others, [1.0, -1.0])["policy_version"] == 1
    trainer.sync()
    while engine.has_unfinished():
        completions += engine.step().finished
    rollouts = [
        make_rollout(
            PROMPTS[int(completion.request_id)],
            completion.token_ids,
            group_id=completion.request_id,
            index=completion.index,
            logprobs=completion.logprobs,
            policy_versions=completion.policy_versions,
            kernel_fingerprint=engine.kernel_fingerprint,
        )
        for completion in completions
    ]
    assert {tuple(sorted(set(rollout.policy_versions))) for rollout in rollouts} == {(0, 1)}
    metrics = trainer.step(rollouts, advantages_of(rollouts))
    assert 0 < metrics["mismatch/num_stale_tokens"] < metrics["mismatch/num_tokens"] == 12 * len(rollouts)
    assert metrics["mismatch/logprob_abs_diff_max"] == 0.0
    other_weights = trainer.policy.token_logprobs(pack(rollouts, advantages_of(rollouts)))
    assert not torch.equal(other_weights, pack(rollouts, advantages_of(rollouts)).rollout_logprobs)  # a control


def test_threads_and_fingerprint_are_recorded(start, engine):
    environment = start(num_threads=2).environment()
    assert environment["num_threads"] == environment["num_torch_threads"] == 2
    assert environment["kernel_fingerprint"] == engine.kernel_fingerprint


def test_a_trainer_goes_on_from_its_checkpoint_bit_for_bit(start, engine, draw, tmp_path):
    settings = {"num_iterations": 2, "num_steps": 4, "learning_rate_schedule": "linear", "kl_coef": 0.1}
    trainer = start(**settings)
    rollouts = draw()
    trainer.step(rollouts, advantages_of(rollouts))
    trainer.step([], [])
    facts = trainer.save_checkpoint(str(tmp_path))
    assert facts == {"policy_version": 1, "num_skipped_steps": 1}
    assert trainer.checkpoint_num_bytes() <= sum(path.stat().st_size for path in tmp_path.rglob("*.safetensors"))
    trainer.sync()
    rollouts = draw()
    expected = trainer.step(rollouts, advantages_of(rollouts))

    resumed = start(**settings)
    resumed.load_checkpoint(str(tmp_path), facts)
    assert resumed.step(rollouts, advantages_of(rollouts)) == expected
    assert expected["actor/lr"] < CONFIG.learning_rate
    with pytest.raises(ValueError, match=r"policy version 1 and a state of version 7: its files were put together"):
        start(**settings).load_checkpoint(str(tmp_path), facts | {"policy_version": 7})
