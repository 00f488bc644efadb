from __future__ import annotations

import math
import time
from dataclasses import dataclass

import pytest
import ray
import torch

from engine import LLMEngine, SamplingParams
from engine.checkpoint import iter_weights
from engine.model import EMBEDDING, LM_HEAD
from rollout import RolloutPool
from rollout.weight_sync import WeightSender, WeightStaging

NORM = "model.norm.weight"
LONG = SamplingParams(n=4, max_tokens=150, ignore_eos=True)
PROMPTS = [[7 + i, 11, 13 + i, 17] for i in range(12)]


@dataclass
class Sequence:
    """Hands out policy versions that increase from test to test."""

    version: int = 0

    def next(self) -> int:
        self.version += 1
        return self.version


@pytest.fixture(scope="module")
def versions() -> Sequence:
    return Sequence()


@pytest.fixture(scope="module")
def pool(local_ray, config):
    with RolloutPool(config, num_engines=2, seed=11) as pool:
        yield pool


@pytest.fixture(autouse=True)
def integrity(request):
    yield
    if "pool" in request.fixturenames:
        request.getfixturevalue("pool").check_integrity()


def wait_until_running(pool: RolloutPool, num_tokens: int = 200) -> None:
    start = sum(stats.num_generated_tokens for stats in pool.stats().engines)
    while sum(stats.num_generated_tokens for stats in pool.stats().engines) < start + num_tokens:
        time.sleep(0.001)


def corrupted(weights: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    """The weights with one thing wrong, at the end, after most of them have been sent."""
    weights = dict(weights)
    if kind == "missing":
        del weights[NORM]
    if kind == "misnamed":
        weights["model.norms.weight"] = weights.pop(NORM)
    if kind == "misshapen":
        weights[NORM] = weights.pop(NORM)[:-1]
    if kind in ("nan", "inf"):
        weights[NORM] = weights.pop(NORM).clone()
        weights[NORM][-1] = float(kind)
    if kind == "integer":
        weights[NORM] = weights.pop(NORM).to(torch.int32)
    return weights


REFUSALS = {
    "missing": r"1 of \d+ weights are missing, such as 'model.norm.weight'",
    "misnamed": "no weight 'model.norms.weight'",
    "misshapen": r"'model.norm.weight' has shape \(63,\), the model's is \(64,\)",
    "nan": "'model.norm.weight' holds NaN or infinity",
    "inf": "'model.norm.weight' holds NaN or infinity",
    "integer": "'model.norm.weight' must be a floating point tensor, got torch.int32",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refused_sync_leaves_every_engine_on_the_old_version(pool, versions, make_weights, kind):
    version = pool.policy_version
    before = pool.generate(PROMPTS, SamplingParams(n=2, max_tokens=6), group_ids=[f"r{i}" for i in range(12)])
    with pytest.raises(ValueError, match=REFUSALS[kind]):
        pool.sync_weights(corrupted(make_weights(99), kind), versions.next())
    assert pool.policy_version == version
    assert [stats.policy_version for stats in pool.stats().engines] == [version] * 2
    after = pool.generate(PROMPTS, SamplingParams(n=2, max_tokens=6), group_ids=[f"r{i}" for i in range(12)])
    assert after == before


@pytest.mark.parametrize(
    ("version", "mode", "message"),
    [
        (0, "recompute", "greater than"),
        ("1", "recompute", "integer"),
        (2**40, "recompute", "integer"),
        (99, "soon", "mode='soon' must be one of 'recompute', 'keep', 'wait', 'abort'"),
    ],
)
def test_a_sync_that_makes_no_sense_is_refused_before_a_tensor_is_read(pool, version, mode, message):
    def unread():
        pytest.fail("a tensor was read")
        yield

    with pytest.raises(ValueError, match=message):
        pool.sync_weights(unread(), version, mode=mode)


def test_rollouts_after_a_sync_are_those_of_an_engine_with_these_weights(pool, versions, config, make_weights):
    weights, version = make_weights(1), versions.next()
    report = pool.sync_weights(iter(weights.items()), version)
    assert report.is_lockstep
    assert report.policy_versions == (version, version)
    assert report.bytes == sum(4 * tensor.numel() for tensor in weights.values())
    assert 0 < max(report.pause_seconds) < report.seconds

    engine = LLMEngine(config)
    assert engine.update_weights(weights, version).checksum.hex() == report.checksum
    for groups in pool.generate(PROMPTS, SamplingParams(n=2, max_tokens=12)):
        (completions,) = engine.generate(
            [groups[0].prompt_token_ids], SamplingParams(n=2, max_tokens=12, seed=groups[0].seed)
        )
        assert [(r.token_ids, r.logprobs, r.policy_versions) for r in groups] == [
            (c.token_ids, c.logprobs, [version] * len(c.token_ids)) for c in completions
        ]


def test_requests_in_flight_go_on_exactly_under_the_new_version(pool, versions, make_weights, forward_logprobs):
    weights = {version: make_weights(version) for version in (versions.next(), versions.next(), versions.next())}
    first, second, third = weights
    pool.sync_weights(weights[first], first)
    stream = pool.stream(PROMPTS, LONG)
    wait_until_running(pool)
    reports = [pool.sync_weights(weights[second], second)]
    wait_until_running(pool)
    reports.append(pool.sync_weights(weights[third], third))
    rollouts = [rollout for group in stream for rollout in group]

    assert all(report.num_recomputed_tokens > 0 for report in reports)
    assert {v for r in rollouts for v in r.policy_versions} == {first, second, third}
    assert any(len(set(r.policy_versions)) == 3 for r in rollouts)
    for rollout in rollouts[:: len(PROMPTS) // 3]:
        assert rollout.is_exact
        assert rollout.policy_versions == sorted(rollout.policy_versions)
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


def test_keep_goes_on_and_says_that_it_is_inexact(pool, versions, make_weights):
    pool.sync_weights(make_weights(1), versions.next())
    stream = pool.stream(PROMPTS, LONG)
    wait_until_running(pool)
    report = pool.sync_weights(make_weights(2), versions.next(), mode="keep")
    rollouts = [rollout for group in stream for rollout in group]
    assert report.num_recomputed_tokens == 0
    mixed = [r for r in rollouts if len(set(r.policy_versions)) > 1]
    assert mixed
    assert not any(r.is_exact for r in mixed)


def test_waiting_ends_what_has_begun_under_the_old_version(pool, versions, make_weights):
    old, new = versions.next(), versions.next()
    pool.sync_weights(make_weights(1), old)
    stream = pool.stream(PROMPTS, LONG)
    wait_until_running(pool)
    report = pool.sync_weights(make_weights(2), new, mode="wait")
    assert report.is_lockstep
    assert report.num_recomputed_tokens == 0
    rollouts = [rollout for group in stream for rollout in group]
    assert all(len(set(rollout.policy_versions)) == 1 and rollout.is_exact for rollout in rollouts)
    assert all(len(rollout.token_ids) == LONG.max_tokens for rollout in rollouts)
    assert any(rollout.policy_versions[0] == old for rollout in rollouts)
    assert {r.policy_versions[0] for group in pool.generate(PROMPTS[:2]) for r in group} == {new}


def test_aborting_hands_back_what_has_begun_and_draws_the_rest_under_the_new_version(pool, versions, make_weights):
    old, new = versions.next(), versions.next()
    pool.sync_weights(make_weights(1), old)
    stream = pool.stream(PROMPTS, LONG)
    wait_until_running(pool)
    assert pool.sync_weights(make_weights(2), new, mode="abort").is_lockstep
    rollouts = [rollout for group in stream for rollout in group]
    assert len(rollouts) == len(PROMPTS) * LONG.n
    ended = [rollout for rollout in rollouts if rollout.finish_reason == "abort"]
    assert ended
    assert all(set(rollout.policy_versions) <= {old} for rollout in ended)
    assert all(set(r.policy_versions) == {new} for r in rollouts if r.finish_reason == "length" and r not in ended)


def test_two_syncs_at_once_leave_the_engines_in_lockstep(pool, versions, make_weights):
    @ray.remote(num_cpus=0)
    def sync(handle, weights, version):
        try:
            return handle.sync_weights(weights, version)
        except ValueError as error:
            return str(error)

    handle, pairs = pool.handle(), [(make_weights(5), versions.next()), (make_weights(6), versions.next())]
    results = ray.get([sync.remote(handle, *pair) for pair in pairs])
    assert results[1].is_lockstep, results
    assert pool.policy_version == versions.version
    assert [stats.policy_version for stats in pool.stats().engines] == [versions.version] * 2


def test_a_sync_in_the_background_has_read_the_tensors_when_it_returns(pool, versions, make_weights):
    weights, version = make_weights(7), versions.next()
    expected = LLMEngine(pool.config).update_weights(weights, version).checksum.hex()
    pending = pool.sync_weights(weights, version, blocking=False)
    for tensor in weights.values():  # as an optimiser does that goes on at once
        tensor.zero_()
    report = pending.result(timeout=30)
    assert report.is_lockstep
    assert report.checksum == expected
    assert pool.policy_version == version


def test_going_back_to_an_older_version_must_be_asked_for(pool, versions, make_weights):
    old, new = versions.next(), versions.next()
    pool.sync_weights(make_weights(8), old)
    before = pool.generate(PROMPTS[:3], SamplingParams(n=2, max_tokens=6), group_ids=["a", "b", "c"])
    pool.sync_weights(make_weights(9), new)
    with pytest.raises(ValueError, match="or rollback=True to go back"):
        pool.sync_weights(make_weights(8), old)
    with pytest.raises(ValueError, match=f"policy_version={new} must be greater"):
        pool.sync_weights(make_weights(8), new, rollback=True)
    assert pool.sync_weights(make_weights(8), old, rollback=True).is_lockstep
    assert pool.policy_version == old
    assert pool.generate(PROMPTS[:3], SamplingParams(n=2, max_tokens=6), group_ids=["a", "b", "c"]) == before


def test_a_sync_whose_sender_fails_half_way_gives_way_to_the_next(pool, versions, make_weights):
    def failing():
        yield from list(make_weights(1).items())[:3]
        raise OSError("the disk with the checkpoint is gone")

    with pytest.raises(OSError, match="the disk with the checkpoint"):
        pool.sync_weights(failing(), versions.next())
    assert pool.sync_weights(make_weights(2), versions.next()).is_lockstep


# --- the sender and the engine's side of it, without engines ---

SHAPES = {"a": (4, 3), "b": (5,), "c": (2, 2)}


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.randn(shape) for name, shape in SHAPES.items()}


def test_buckets_hold_every_tensor_once_and_in_order():
    given = tensors()
    sender = WeightSender(SHAPES, bucket_bytes=60)
    buckets = list(sender.buckets(given))
    assert [list(bucket.arrays) for bucket in buckets] == [["a"], ["b", "c"]]
    assert sender.num_bytes == 4 * sum(math.prod(shape) for shape in SHAPES.values())
    assert all(torch.equal(torch.from_numpy(b.arrays[name]), given[name]) for b in buckets for name in b.arrays)


def test_other_dtypes_and_layouts_arrive_as_contiguous_float32():
    given = {**tensors(), "a": torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True).T}
    (bucket,) = WeightSender(SHAPES).buckets(given)
    assert bucket.arrays["a"].flags.c_contiguous
    assert torch.equal(torch.from_numpy(bucket.arrays["a"]), given["a"].detach().float())


def test_a_tensor_given_twice_is_refused():
    given = tensors()
    with pytest.raises(ValueError, match="'a' is given twice"):
        list(WeightSender(SHAPES).buckets([*given.items(), ("a", given["a"])]))


def test_a_tied_head_may_come_along_if_it_is_the_embedding():
    shapes = {EMBEDDING: (6, 2)}
    embedding = torch.randn(6, 2)
    sender, plain = WeightSender(shapes), WeightSender(shapes)
    (bucket,) = sender.buckets({LM_HEAD: embedding.clone(), EMBEDDING: embedding})
    assert list(bucket.arrays) == [EMBEDDING]
    assert len(list(plain.buckets({EMBEDDING: embedding}))) == 1
    assert sender.checksum == plain.checksum
    with pytest.raises(ValueError, match="they differ"):
        list(WeightSender(shapes).buckets({LM_HEAD: embedding + 1, EMBEDDING: embedding}))


def test_bits_that_changed_on_the_way_are_noticed():
    (bucket,) = WeightSender(SHAPES).buckets(tensors())
    staging = WeightStaging()
    staging.add("good", bucket)
    assert set(staging.take("good").tensors) == set(SHAPES)
    bucket.arrays["b"].view("int32")[2] ^= 1
    with pytest.raises(RuntimeError, match="'b' arrived with other bits"):
        staging.add("bad", bucket)


def test_the_checksum_sent_is_the_one_an_engine_computes(config, model_dir):
    engine = LLMEngine(config)
    sender = WeightSender(engine.weight_shapes())
    assert list(sender.buckets(iter_weights(model_dir)))
    assert sender.checksum == engine.weights_checksum
