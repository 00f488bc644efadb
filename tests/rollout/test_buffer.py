from __future__ import annotations

import dataclasses
import itertools
import time
from types import SimpleNamespace

import pytest

from engine import SamplingParams
from rollout import Buffered, EngineError, RolloutPool
from rollout.buffer import RolloutBuffer, StalenessLimit

PARAMS = SamplingParams(n=2, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(n=2, max_tokens=400, ignore_eos=True)


@pytest.fixture(scope="module")
def pool(local_ray, config):
    with RolloutPool(config, num_engines=2, seed=5, max_staleness=1, groups_per_version=3, on_stale="redraw") as pool:
        yield pool


@pytest.fixture
def numbers():
    return itertools.count()


def submit(pool, numbers, num_groups: int = 1, params: SamplingParams = PARAMS) -> list[str]:
    prompts = [[5 + next(numbers), 9, 11] for _ in range(num_groups)]
    return pool.submit(prompts, params)


def versions(groups) -> set[int]:
    return {version for group in groups for rollout in group for version in rollout.policy_versions}


def test_an_asynchronous_trainer_never_sees_a_token_older_than_the_bound(pool, numbers, make_weights):
    """Filled up whenever there is capacity, three groups a version: what is collected lies at most one version back."""
    ids, seen = [], []
    for _ in range(5):
        while pool.has_capacity():
            ids += submit(pool, numbers)
        version = pool.policy_version
        groups = pool.collect(3)
        assert versions(groups) <= {version - 1, version}
        assert pool.buffer_stats().staleness_max <= 1
        seen += [group[0].group_id for group in groups]
        pool.sync_weights(make_weights(version + 1), version + 1)
    stats = pool.buffer_stats()
    assert len(seen) == len(set(seen)) == stats.num_collected == 15
    assert set(seen) <= set(ids)
    assert stats.num_submitted == len(ids) == 15 + stats.num_running + stats.num_ready
    assert 3 <= stats.num_running + stats.num_ready <= 6
    assert stats.num_stale_redrawn == 0
    pool.collect(stats.num_running + stats.num_ready)


def test_capacity_counts_what_is_on_its_way_and_what_no_version_was_made_of(pool, numbers, make_weights):
    pool.sync_weights(make_weights(3), pool.policy_version + 1)
    assert pool.has_capacity(6)
    assert not pool.has_capacity(7)
    submit(pool, numbers, 4)
    with pytest.raises(ValueError, match=r"3 groups are more than the 2 .*max_staleness=1 and groups_per_version=3"):
        submit(pool, numbers, 3)
    pool.collect(3)
    assert not pool.has_capacity(3)  # those three are being trained on
    pool.sync_weights(make_weights(4), pool.policy_version + 1)
    assert pool.has_capacity(5)
    pool.collect(1)


def test_what_is_too_old_is_drawn_again_and_counted(pool, numbers, make_weights):
    before = pool.buffer_stats().num_stale_redrawn
    num_finished = sum(stats.requests.num_finished for stats in pool.stats().engines)
    [group_id] = submit(pool, numbers)
    while sum(stats.requests.num_finished for stats in pool.stats().engines) < num_finished + PARAMS.n:
        time.sleep(0.01)
    for _ in range(2):
        pool.sync_weights(make_weights(pool.policy_version), pool.policy_version + 1)
    [group] = pool.collect(1)
    assert group[0].group_id == group_id
    assert versions([group]) == {pool.policy_version}
    assert pool.buffer_stats().num_stale_redrawn == before + 1


def test_what_was_discarded_makes_room_before_the_next_version(pool, numbers, make_weights):
    pool.sync_weights(make_weights(5), pool.policy_version + 1)
    submit(pool, numbers, 6)
    pool.collect(6)
    assert pool.capacity() == 0
    pool.discard(2)
    assert pool.capacity() == 2
    pool.discard(9)
    assert pool.capacity() == 6


def test_another_handle_goes_on_with_what_was_not_collected(pool, numbers, make_weights):
    """As a run does that is taken up from a checkpoint."""
    pool.sync_weights(make_weights(6), pool.policy_version + 1)
    finished = submit(pool, numbers, 2)
    while pool.buffer_stats().num_ready < 2:
        time.sleep(0.01)
    [running] = submit(pool, numbers, params=LONG)
    buffered = pool.buffered()
    assert [group[0].group_id for group in buffered.ready] == finished
    assert [group.request.group_id for group in buffered.running] == [running]
    other = pool.handle()
    other.put_back(buffered.ready)
    assert other.buffered() == Buffered(ready=buffered.ready, running=[])
    assert other.collect(2) == buffered.ready == pool.collect(2)
    pool.abort([running])
    pool.collect(1)


def test_groups_that_are_put_back_grow_old_like_others(pool, numbers, make_weights):
    pool.sync_weights(make_weights(7), pool.policy_version + 1)
    [group_id] = submit(pool, numbers)
    [group] = pool.collect(1)
    other = pool.handle()
    other.put_back([group])
    for seed in (8, 9):
        pool.sync_weights(make_weights(seed), pool.policy_version + 1)
    [redrawn] = other.collect(1)  # max_staleness is 1
    assert redrawn[0].group_id == group_id
    assert redrawn[0].prompt_token_ids == group[0].prompt_token_ids
    assert versions([redrawn]) == {pool.policy_version}


def test_too_many_groups_and_those_of_other_kernels_are_not_put_back(pool, numbers):
    submit(pool, numbers)
    [group] = pool.collect(1)
    with pytest.raises(ValueError, match=r"7 groups are more than the \d that may be submitted now"):
        pool.handle().put_back([group] * 7)
    others = [dataclasses.replace(rollout, kernel_fingerprint="another") for rollout in group]
    with pytest.raises(ValueError, match="fingerprint another, this pool's is"):
        pool.handle().put_back([others])


def test_groups_come_in_the_order_of_submission_and_late_ones_stay(pool, numbers):
    [late] = submit(pool, numbers, params=LONG)
    early = submit(pool, numbers, 2)
    assert [group[0].group_id for group in pool.collect(2)] == early
    with pytest.raises(TimeoutError, match=r"0 of 1 groups are ready after 0 s, 1 are running"):
        pool.collect(1, timeout=0)
    pool.abort([late])
    [group] = pool.collect(1)
    assert {rollout.finish_reason for rollout in group} == {"abort"}
    with pytest.raises(ValueError, match=r"collect\(1\) would wait for ever"):
        pool.collect(1)


def test_without_a_bound_on_staleness_what_engines_can_queue_is_the_limit(local_ray, config, make_weights):
    from dataclasses import replace

    with RolloutPool(replace(config, max_num_seqs=4), num_engines=1) as pool:
        assert pool.has_capacity(16)
        assert not pool.has_capacity(17)
        pool.submit([[5, 6]] * 3, PARAMS, group_ids=["a", "b", "c"], metadata=[{"row": i} for i in range(3)])
        pool.sync_weights(make_weights(1), 1)
        pool.sync_weights(make_weights(2), 7)
        groups = pool.collect(3)
        assert [(group[0].group_id, group[0].metadata) for group in groups] == [
            ("a", {"row": 0}), ("b", {"row": 1}), ("c", {"row": 2})
        ]  # fmt: skip


class FailingSubmission:
    """Gives back what it was given, once; then its engines are found to be gone."""

    def add(self, groups):
        self.groups = groups

    def take(self, timeout):
        if not self.groups:
            raise EngineError("no engine is left")
        groups, self.groups = self.groups, []
        return [(group, None) for group in groups]


def test_a_failure_that_is_noticed_late_takes_no_finished_group_along():
    group = SimpleNamespace(request=SimpleNamespace(group_id="g"), rollouts=lambda result: [])
    buffer = RolloutBuffer(FailingSubmission(), None, lambda: 0, list, lambda: 1, lambda rollouts: None)
    buffer.submit([group])
    assert buffer.collect(1, timeout=None) == [[]]
    with pytest.raises(EngineError, match="no engine is left"):
        buffer.stats()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_staleness": -1, "groups_per_version": 1}, "max_staleness=-1"),
        ({"max_staleness": 0, "groups_per_version": 0}, "groups_per_version=0"),
        ({"max_staleness": 0, "groups_per_version": 1, "on_stale": "keep"}, "on_stale='keep' must be"),
    ],
)
def test_limits_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        StalenessLimit(**options)


def test_a_bound_needs_to_know_what_a_version_is_made_of(config):
    with pytest.raises(ValueError, match="max_staleness=2 needs groups_per_version"):
        RolloutPool(config, max_staleness=2)
