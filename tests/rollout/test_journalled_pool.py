from __future__ import annotations

import random

import pytest

from engine import SamplingParams
from rollout import JournalError, RolloutPool
from rollout.journal import RunJournal, read_journal
from rollout.journal_format import JournalledGroup
from rollout.replay import replay
from tests.rollout.killing import Orders, dying_amid, mortal_engines

PARAMS = SamplingParams(n=2, max_tokens=40, ignore_eos=True)


def prompts(num_prompts: int, seed: int) -> list[list[int]]:
    draw = random.Random(seed)
    return [[draw.randrange(5, 200) for _ in range(draw.randrange(3, 30))] for _ in range(num_prompts)]


def run_asynchronously(pool: RolloutPool, weights, num_versions: int, before_version=lambda version: None) -> list:
    """Requests are always under way while weights change; long ones run across several versions."""
    collected = []
    for version in range(1, num_versions + 1):
        before_version(version)
        while pool.has_capacity():
            pool.submit(prompts(1, seed=1000 * version + len(collected)), PARAMS)
        collected += pool.collect(4)
        assert pool.sync_weights(weights(version), version).is_lockstep
    return collected + pool.collect(pool.buffer_stats().num_running + pool.buffer_stats().num_ready)


def groups_of(journal: RunJournal) -> list[JournalledGroup]:
    return [group for file in journal.files for group in file.groups()]


def check_replays(directory, collected) -> None:
    """Everything that was delivered is in the journal once, and is drawn again to the bit."""
    journal = read_journal(directory)
    assert sorted(group.group_id for group in groups_of(journal)) == sorted(group[0].group_id for group in collected)
    report = replay(journal)
    assert not report.differences
    assert not report.not_replayable
    assert report.num_tokens == sum(len(rollout.token_ids) for group in collected for rollout in group)


@pytest.mark.parametrize(
    "moments",
    [
        {2: "step", 3: "commit"},
        pytest.param({2: "step", 3: "commit", 4: "delivery", 5: "staging"}, marks=pytest.mark.slow),
    ],
    ids=len,
)
def test_a_run_with_kills_and_moving_weights_is_drawn_again_to_the_bit(
    local_ray, config, make_weights, tmp_path, moments
):
    """moments: at which an engine is killed, by the version that the engines take next."""
    orders = Orders(tmp_path / "orders")
    orders.directory.mkdir()
    run_directory = tmp_path / "run"
    with RolloutPool(
        config, num_engines=2, seed=3, max_staleness=2, groups_per_version=4,
        journal=run_directory, keep_weights_every=1, engine_factory=mortal_engines(orders),
    ) as pool:  # fmt: skip
        collected = run_asynchronously(
            pool,
            lambda version: dying_amid(make_weights(version), orders, lambda: [info.pid for info in pool.engine_infos]),
            num_versions=max(moments) + 1,
            before_version=lambda version: orders.give(moments[version]) if version in moments else None,
        )
        assert pool.buffer_stats().num_stale_dropped == 0
    assert sum(orders.num_done().values()) == len(moments)
    versions = [set(rollout.policy_versions) for group in collected for rollout in group]
    assert any(len(some) > 1 for some in versions), "no request ran across a change of weights"
    check_replays(run_directory, collected)


def test_a_journal_that_cannot_be_written_stops_the_sync_and_leaves_the_old_weights(
    local_ray, config, make_weights, tmp_path
):
    with RolloutPool(config, num_engines=1, journal=tmp_path, keep_weights_every=1) as pool:
        pool.generate(prompts(2, seed=0), PARAMS)
        (tmp_path / "weights").write_text("no folder can be made here")
        with pytest.raises(JournalError, match="weights of version 1 cannot be kept"):
            pool.sync_weights(make_weights(1), 1)
        assert pool.policy_version == 0
        assert {stats.policy_version for stats in pool.stats().engines} == {0}
        (tmp_path / "weights").unlink()
        assert pool.sync_weights(make_weights(1), 1).is_lockstep
        assert len(pool.generate(prompts(2, seed=1), PARAMS)) == 2
    journal = read_journal(tmp_path)
    assert len(groups_of(journal)) == 4
    assert [switch.policy_version for switch in journal.switches()] == [1]


def test_weights_are_kept_in_a_journal_only(config):
    with pytest.raises(ValueError, match="keep_weights_every=3 and keep_last=None need a journal"):
        RolloutPool(config, keep_weights_every=3)
