"""Steps that are planned before the last one's tokens are known, and cycles of several steps."""

from __future__ import annotations

import pytest
from fake_engine import BLOCK_SIZE, Engine, Limits, never_stop, results

from engine.request import Request, RequestStatus


def letters(text: str):
    """Draws the letters in turn, whoever asks."""
    rest = iter(text)
    return lambda sample: ord(next(rest))


def test_two_batches_are_under_way_before_the_first_token_is_known():
    engine = Engine(depth=2)
    request = engine.add("a", 6, max_tokens=4)
    engine.launch(engine.scheduler.schedule())
    engine.launch(engine.scheduler.schedule())
    assert engine.plans == [[("a", 0, 6)], [("a", 6, 1)]]
    assert (request.num_output_tokens, request.num_pending_tokens) == (0, 2)
    second = engine.under_way[1][0].scheduled[0]
    assert second.source == 0, "its input is what the first step's first sample draws"
    assert [len(engine.take_in(never_stop).new_tokens) for _ in range(2)] == [1, 1]


def test_each_step_draws_what_it_draws_alone_and_in_order():
    for depth, num_steps in ((2, 1), (1, 4), (2, 3)):
        engines = (Engine(), Engine(Limits(num_scheduler_steps=num_steps), depth=depth))
        for engine in engines:
            for i, name in enumerate("abc"):
                engine.add(name, 5 + i, n=2, max_tokens=7 + i)
        assert results(engines[0].drain()) == results(engines[1].drain())


def test_no_step_is_planned_for_a_token_that_cannot_come():
    """The end by length is known in advance, so nothing is drawn that must be dropped."""
    engine = Engine(depth=2)
    engine.add("a", 6, max_tokens=3)
    engine.drain()
    assert engine.plans == [[("a", 0, 6)], [("a", 6, 1)], [("a", 7, 1)]]
    engine = Engine(Limits(max_model_len=9), depth=2)
    engine.add("a", 6, max_tokens=50)
    engine.drain()
    assert engine.plans == [[("a", 0, 6)], [("a", 6, 1)], [("a", 7, 1)]]


@pytest.mark.parametrize(
    ("params", "drawn", "expected"),
    [
        ({}, "ab\0zz", ("ab\0", "stop", None, "ab")),
        ({"stop_token_ids": [ord("c")]}, "abczz", ("abc", "stop", ord("c"), "ab")),
        ({"stop": "bc"}, "abczz", ("abc", "stop", "bc", "a")),
        ({"max_tokens": 3}, "abczz", ("abc", "length", None, "abc")),
        ({"min_tokens": 3}, "\0b\0zz", ("\0b\0", "stop", None, "b")),
    ],
)
@pytest.mark.parametrize(("depth", "num_steps"), [(2, 1), (1, 4), (2, 4)])
def test_a_stop_found_late_drops_exactly_the_surplus(params, drawn, expected, depth, num_steps):
    engine = Engine(Limits(num_scheduler_steps=num_steps), depth=depth)
    engine.add("a", 5, **params)
    draw = letters(drawn + "z" * 20)
    while engine.scheduler.has_unfinished():
        engine.step(draw)
    engine.settle()
    [c] = engine.finished
    assert ("".join(map(chr, c.token_ids)), c.finish_reason, c.stop_reason, c.text) == expected
    assert len(c.logprobs) == len(c.policy_versions) == len(c.token_ids)
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_a_request_preempted_during_execution_still_gets_its_token():
    engine = Engine(num_blocks=6, depth=2)
    engine.add("a", 7, max_tokens=12)
    victim = engine.add("b", 7, max_tokens=12)
    while victim.status is not RequestStatus.PREEMPTED:
        known = list(victim.token_ids)
        engine.step(never_stop)
    assert victim.num_output_tokens == len(known) - 7 + 1, "the step that ran when it was preempted drew one more"
    assert victim.num_pending_tokens == 0
    engine.drain()


def test_a_request_preempted_with_a_token_under_way_is_not_admitted_before_it_is_known():
    engine = Engine(num_blocks=6, depth=2)
    engine.add("a", 7, max_tokens=12)
    victim = engine.add("b", 7, max_tokens=12)
    while not engine.scheduler.num_preemptions:
        if len(engine.under_way) < 2:
            engine.launch(engine.scheduler.schedule())
        if not engine.scheduler.num_preemptions and len(engine.under_way) == 2:
            engine.take_in(never_stop)
    assert victim.num_pending_tokens == 1
    engine.scheduler.abort({"a"})  # room for everybody
    assert engine.waiting() == [("b", 0)]
    if len(engine.under_way) < 2:
        assert engine.scheduler.schedule().is_empty
    engine.take_in(never_stop)
    engine.drain()


def test_an_abort_drops_what_is_under_way():
    engine = Engine(depth=2)
    engine.add("a", 6, n=2, max_tokens=9)
    engine.add("b", 6, max_tokens=9)
    engine.step(never_stop)
    assert len(engine.under_way) == 1
    aborted = engine.scheduler.abort({"a"})
    assert [(c.index, len(c.token_ids)) for c in aborted] == [(0, 1), (1, 1)]
    engine.drain()
    assert results(engine.finished).keys() == {("b", 0)}


def test_an_id_may_be_used_again_while_its_first_bearer_is_under_way():
    engine = Engine(depth=2)
    engine.add("a", 6, max_tokens=9)
    engine.step(never_stop)
    engine.scheduler.abort({"a"})
    engine.add("a", 5, max_tokens=2)
    engine.drain()
    assert [len(c.token_ids) for c in engine.finished] == [2]


def test_a_group_forks_before_its_first_tokens_are_known():
    engine = Engine(depth=2)
    engine.add("a", 6, n=3, max_tokens=4)
    engine.launch(engine.scheduler.schedule())
    assert engine.running() == [("a", 0), ("a", 1), ("a", 2)]
    engine.launch(engine.scheduler.schedule())
    assert engine.plans[-1] == [("a", 6, 1)] * 3
    assert [entry.source for entry in engine.under_way[-1][0].scheduled] == [0, 1, 2]
    engine.drain()


def test_a_block_filled_by_an_unknown_token_is_found_once_it_is_known():
    engine = Engine(depth=2)
    prompt = list(range(1, BLOCK_SIZE))  # the first token drawn fills the block
    engine.add("a", prompt, max_tokens=8)
    engine.launch(engine.scheduler.schedule())
    engine.launch(engine.scheduler.schedule())
    assert not engine.pool._block_of_hash
    engine.take_in(never_stop)
    assert len(engine.pool._block_of_hash) == 1
    engine.add("b", [*prompt, 7, 30], max_tokens=1)
    engine.settle()
    engine.step(never_stop)
    assert ("b", BLOCK_SIZE, 1) in engine.plans[-2]
    engine.drain()


def test_a_failed_step_takes_the_one_behind_it_along():
    engine = Engine(depth=2)
    engine.add("a", 6, n=2, max_tokens=6)
    expected = Engine()
    expected.add("a", 6, n=2, max_tokens=6)
    engine.step()
    engine.under_way.clear()
    engine.scheduler.abandon_steps()
    engine.scheduler.check_integrity()
    assert results(engine.drain()) == results(expected.drain())


# Cycles


def test_a_cycle_reserves_its_blocks_and_ends_each_request_where_it_must():
    engine = Engine(Limits(num_scheduler_steps=4))
    engine.add("a", 6, max_tokens=3)
    engine.add("b", 6, max_tokens=9)
    engine.step(never_stop)
    step = engine.step(never_stop)
    plan = engine.plans[-1]
    assert plan == [("a", 6, 1), ("b", 6, 1)]
    assert [token.request_id for token in step.new_tokens] == ["a", "b", "a", "b", "b", "b"]
    engine.drain()


def test_one_step_at_a_time_while_somebody_prefills_or_could():
    engine = Engine(Limits(num_scheduler_steps=4, max_num_seqs=3, max_num_batched_tokens=8), num_blocks=13)
    engine.add("a", 4, max_tokens=30)
    engine.step(never_stop)
    engine.add("long", 12, max_tokens=30)
    assert [len(engine.step(never_stop).new_tokens) for _ in range(2)] == [1, 2]
    assert len(engine.step(never_stop).new_tokens) == 8, "both decode and nobody waits"
    engine.add("waits for blocks", 30, max_tokens=1)
    assert len(engine.step(never_stop).new_tokens) == 2
    assert engine.waiting() == [("waits for blocks", 0)]


def test_nobody_is_kept_from_beginning_by_a_cycle_where_all_seats_are_taken():
    engine = Engine(Limits(num_scheduler_steps=4, max_num_seqs=1))
    engine.add("a", 4, max_tokens=6)
    engine.add("waits for a seat", 4, max_tokens=1)
    assert [len(engine.step(never_stop).new_tokens) for _ in range(3)] == [1, 4, 1]
    assert [token.request_id for token in engine.step(never_stop).new_tokens] == ["waits for a seat"]


def test_a_sample_that_stops_in_a_cycle_frees_its_blocks():
    engine = Engine(Limits(num_scheduler_steps=5))
    engine.add("a", 6, max_tokens=20)
    engine.step(never_stop)
    engine.step(letters("x\0zzz"))
    assert [len(c.token_ids) for c in engine.finished] == [3]
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_counters_count_every_step_of_a_cycle():
    engine = Engine(Limits(num_scheduler_steps=4))
    engine.add("a", 6, n=2, max_tokens=5)
    engine.drain()
    stats = engine.scheduler.stats()
    assert (stats.num_steps, stats.num_scheduled_tokens, stats.num_generated_tokens) == (5, 6 + 2 * 4, 10)


# Reset, and who is admitted


def test_a_forced_reset_keeps_the_order_of_arrival():
    engine = Engine(Limits(max_num_seqs=2))
    for name in "abcd":
        engine.add(name, 6, max_tokens=8)
    engine.step(never_stop)
    assert not engine.scheduler.reset_prefix_cache()
    assert engine.scheduler.reset_prefix_cache(preempt_running=True)
    assert engine.waiting() == [(name, 0) for name in "abcd"]
    assert not engine.pool._block_of_hash
    engine.step(never_stop)
    assert engine.running() == [("a", 0), ("b", 0)]
    engine.drain()


def test_only_those_that_have_begun_go_on_where_admission_says_so():
    engine = Engine(num_blocks=6)
    engine.add("a", 7, max_tokens=12)
    engine.add("b", 7, max_tokens=12)
    engine.run_until_preemption()
    engine.add("new", 2, max_tokens=1, priority=-1)
    engine.scheduler.admission = "started"
    assert engine.scheduler.started_requests() == ["a", "b"]
    while engine.scheduler.started_requests():
        engine.step(never_stop)
    assert [c.request_id for c in engine.finished] == ["a", "b"]
    assert engine.scheduler.schedule().is_empty
    engine.scheduler.admission = "all"
    engine.drain()


def test_a_sample_under_way_counts_as_begun():
    engine = Engine(depth=2)
    request: Request = engine.add("a", 6, max_tokens=2)
    assert not request.has_started
    engine.launch(engine.scheduler.schedule())
    assert request.has_started
    engine.drain()
