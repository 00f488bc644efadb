"""The scheduler's plans, checked on a KV cache that remembers what was stored in each slot under which weights."""

from __future__ import annotations

from collections import Counter

import pytest
from fake_engine import EOS, Characters, Engine, Limits, never_stop

from engine.detokenizer import Detokenizer
from engine.request import Request, RequestStatus
from engine.sampling_params import SamplingParams
from engine.step_plan import ModelRunnerOutput

# The token budget


def test_prompts_share_the_budget_in_order_and_the_threshold_caps_each():
    engine = Engine(
        Limits(max_num_batched_tokens=1024, long_prefill_token_threshold=400, max_model_len=1000), num_blocks=700
    )
    for name in "abc":
        engine.add(name, 800, max_tokens=2)
    assert not engine.step().new_tokens
    assert [t.request_id for t in engine.step().new_tokens] == ["a", "b"]
    engine.step()
    engine.step()
    assert engine.plans == [
        [("a", 0, 400), ("b", 0, 400), ("c", 0, 224)],
        [("a", 400, 400), ("b", 400, 400), ("c", 224, 224)],
        [("a", 800, 1), ("b", 800, 1), ("c", 448, 352)],
        [("c", 800, 1)],
    ]


def test_a_prompt_longer_than_the_budget_is_cut_and_only_its_last_piece_draws():
    engine = Engine(Limits(max_num_batched_tokens=5))
    engine.add("a", 12, max_tokens=1)
    assert [len(engine.step().new_tokens) for _ in range(3)] == [0, 0, 1]
    assert engine.plans == [[("a", 0, 5)], [("a", 5, 5)], [("a", 10, 2)]]


def test_running_requests_are_served_before_waiting_ones():
    engine = Engine(Limits(max_num_batched_tokens=10))
    engine.add("a", 8, max_tokens=8)
    engine.step()
    engine.add("b", 20, max_tokens=8)
    engine.step()
    assert engine.plans[-1] == [("a", 8, 1), ("b", 0, 9)]


def test_a_long_prompt_does_not_stall_short_ones():
    engine = Engine(Limits(max_num_batched_tokens=16, long_prefill_token_threshold=8))
    engine.add("long", 60, max_tokens=1)
    engine.add("short", 8, max_tokens=2)
    step = engine.step()
    assert [token.request_id for token in step.new_tokens] == ["short"]


def test_no_step_exceeds_the_budget_or_the_threshold():
    limits = Limits(max_num_batched_tokens=7, long_prefill_token_threshold=3)
    engine = Engine(limits)
    for name in "abcdef":
        engine.add(name, 9, max_tokens=4)
    engine.drain()
    assert max(sum(num_tokens for *_, num_tokens in plan) for plan in engine.plans) == 7
    assert max(num_tokens for plan in engine.plans for *_, num_tokens in plan) == 3


def test_an_idle_scheduler_plans_nothing():
    plan = Engine().scheduler.schedule()
    assert plan.is_empty
    assert plan.num_scheduled_tokens == 0


# Groups


def test_a_group_holds_its_seats_from_admission():
    engine = Engine(Limits(max_num_seqs=4, max_num_batched_tokens=4))
    engine.add("a", 12, n=3, max_tokens=4)
    engine.add("b", 4, n=2, max_tokens=2)
    engine.add("c", 4, max_tokens=2)
    for _ in range(3):
        engine.step(never_stop)
        assert ("b", 0) in engine.waiting(), "three seats are taken though one request runs"
    assert engine.scheduler.stats().num_requests_running == 3
    assert engine.scheduler.stats().num_requests_waiting == 3
    assert engine.waiting() == [("b", 0), ("c", 0)], "the head of the queue is not overtaken"
    engine.drain()


def test_the_prompt_is_computed_once_and_its_last_row_drawn_n_times():
    engine = Engine()
    engine.add("a", 10, n=3, max_tokens=3)
    step = engine.step()
    assert engine.plans == [[("a", 0, 10)]]
    assert [(token.request_id, token.index) for token in step.new_tokens] == [("a", 0), ("a", 1), ("a", 2)]
    assert engine.running() == [("a", 0), ("a", 1), ("a", 2)]
    engine.step()
    assert engine.plans[-1] == [("a", 10, 1)] * 3


def test_forked_samples_share_blocks_until_they_write():
    engine = Engine()
    engine.add("a", 10, n=3, max_tokens=8)
    engine.step(never_stop)
    tables = [request.block_ids for request in engine.scheduler.running]
    assert tables[0] == tables[1] == tables[2]
    assert engine.pool.num_blocks - engine.pool.num_free_blocks == 3
    engine.step(never_stop)
    tables = [request.block_ids for request in engine.scheduler.running]
    assert tables[0][:2] == tables[1][:2] == tables[2][:2], "full blocks stay shared"
    assert len({table[2] for table in tables}) == 3
    assert engine.runner.num_copies == 2, "the last sample writes into the block that was everybody's"
    engine.step(never_stop)
    assert engine.runner.num_copies == 2, "a block is copied once"


def test_a_prompt_that_fills_its_blocks_is_never_copied():
    engine = Engine()
    engine.add("a", 8, n=4, max_tokens=3)
    engine.drain()
    assert engine.runner.num_copies == 0


def test_a_sample_that_stops_at_its_first_token_leaves_the_others_alone():
    engine = Engine()
    engine.add("a", 10, n=3, max_tokens=4)
    step = engine.step(lambda sample: EOS if sample.index == 1 else 9)
    assert [(c.index, c.finish_reason) for c in step.finished] == [(1, "stop")]
    assert engine.running() == [("a", 0), ("a", 2)]
    assert engine.scheduler.stats().num_requests_running == 2
    assert sorted(c.index for c in engine.drain()) == [0, 1, 2]


def test_a_leader_may_finish_before_its_siblings():
    engine = Engine()
    engine.add("a", 10, n=3, max_tokens=4)
    step = engine.step(lambda sample: EOS if sample.index == 0 else 9)
    assert [c.index for c in step.finished] == [0]
    assert engine.running() == [("a", 1), ("a", 2)]
    engine.drain()


def test_all_samples_may_stop_at_their_first_token():
    engine = Engine()
    engine.add("a", 10, n=4)
    assert len(engine.step(lambda sample: EOS).finished) == 4
    assert not engine.scheduler.has_unfinished()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks


def test_a_group_preempted_before_its_fork_goes_back_whole():
    engine = Engine(Limits(long_prefill_token_threshold=1), num_blocks=9)
    engine.add("a", 3, max_tokens=30)
    group = engine.add("b", 20, n=2, max_tokens=2)
    engine.run_until_preemption()
    assert engine.running() == [("a", 0)]
    assert engine.waiting() == [("b", 0)]
    assert len(group.siblings) == 1
    assert group.num_output_tokens == group.num_computed_tokens == 0
    assert engine.scheduler.stats().num_requests_running == 1
    assert len(engine.drain()) == 3


# Preemption


def test_the_latest_request_is_preempted_and_keeps_its_tokens():
    engine = Engine(num_blocks=6)
    engine.add("a", 7, max_tokens=12)
    later = engine.add("b", 7, max_tokens=12)
    engine.run_until_preemption()
    assert engine.running() == [("a", 0)]
    assert engine.waiting() == [("b", 0)]
    assert later.status is RequestStatus.PREEMPTED
    assert later.num_output_tokens == len(later.logprobs) > 0
    assert later.block_ids == []
    engine.drain()
    assert later.num_preemptions == 1


def test_the_least_important_request_is_preempted_whenever_it_came():
    engine = Engine(num_blocks=6)
    engine.add("low", 7, max_tokens=12, priority=1)
    engine.step(never_stop)
    engine.add("high", 7, max_tokens=12, priority=-1)
    engine.run_until_preemption()
    assert engine.running() == [("high", 0)]
    assert engine.waiting() == [("low", 0)]
    engine.drain()


def test_waiting_requests_go_by_priority_then_arrival():
    engine = Engine(Limits(max_num_seqs=1))
    for name, priority in [("a", 0), ("b", 1), ("c", 0), ("d", -1)]:
        engine.add(name, 3, max_tokens=1, priority=priority)
    assert [c.request_id for c in engine.drain()] == ["d", "a", "c", "b"]


def test_order_of_arrival_survives_preemption():
    engine = Engine(Limits(max_num_seqs=4), num_blocks=8)
    names = "abcdefgh"
    for name in names:
        engine.add(name, 6, max_tokens=9)
    while engine.scheduler.has_unfinished():
        engine.step(never_stop)
        queue = [name for name, _ in engine.running() + engine.waiting()]
        assert queue == sorted(queue)
    assert engine.scheduler.num_preemptions > 0
    assert [c.request_id for c in engine.finished] == sorted(names)


def test_the_first_running_request_goes_on_in_every_step():
    engine = Engine(num_blocks=9)
    for name in "abcdef":
        engine.add(name, 6, n=2, max_tokens=16)
    progress = Counter()
    while engine.scheduler.has_unfinished():
        first = engine.scheduler.running[0] if engine.scheduler.running else None
        before = first.num_computed_tokens if first else 0
        engine.step(never_stop)
        if first is not None and first.status is RequestStatus.RUNNING:
            assert first.num_computed_tokens > before
        progress["steps"] += 1
    assert engine.scheduler.num_preemptions > 0
    assert len(engine.finished) == 12


def test_a_preempted_request_hits_its_own_blocks_when_it_comes_back():
    engine = Engine(num_blocks=8)
    engine.add("a", 7, max_tokens=14)
    later = engine.add("b", 9, max_tokens=12)
    engine.run_until_preemption()
    engine.scheduler.abort({"a"})
    engine.step(never_stop)
    assert later.num_cached_tokens >= 8
    engine.drain()


def test_nothing_is_admitted_in_a_step_that_preempts():
    engine = Engine(num_blocks=6)
    engine.add("a", 7, max_tokens=12)
    engine.add("b", 7, max_tokens=12)
    engine.step(never_stop)
    engine.add("c", 1, max_tokens=13, priority=-1)  # first in line, but the others may need the last blocks
    engine.run_until_preemption()
    assert {name for name, *_ in engine.plans[-1]} == {"a"}


def test_a_request_that_fills_the_whole_pool_alone_is_served():
    engine = Engine(num_blocks=5)
    engine.add("small", 4, n=3, max_tokens=8)
    engine.add("all", 12, n=2, max_tokens=9)
    engine.add("after", 4, max_tokens=8)
    assert len(engine.drain()) == 6


def test_a_shared_block_needs_no_copy_once_the_other_sample_is_preempted():
    engine = Engine(num_blocks=2)
    engine.add("a", 6, n=2, max_tokens=3)
    engine.step(never_stop)  # both share two blocks and none is free
    engine.step(never_stop)
    assert engine.runner.num_copies == 0
    assert engine.running() == [("a", 0)]
    assert engine.waiting() == [("a", 1)]
    assert {c.index: c.token_ids for c in engine.drain()}.keys() == {0, 1}


# Prefix cache


def test_a_finished_request_leaves_its_blocks_to_the_next():
    engine = Engine()
    prompt = list(range(1, 13))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    second = engine.add("b", [*prompt, 99], max_tokens=1)
    engine.step()
    assert engine.plans[-1] == [("b", 12, 1)]
    assert second.num_cached_tokens == 12
    stats = engine.scheduler.stats()
    assert (stats.prefix_cache_queries, stats.prefix_cache_hits) == (25, 12)
    assert stats.prefix_cache_hit_rate == 12 / 25


def test_the_last_prompt_token_is_always_computed():
    engine = Engine()
    prompt = list(range(1, 13))
    for name in "ab":
        engine.add(name, prompt, max_tokens=1)
        engine.step()
    assert engine.plans == [[("a", 0, 12)], [("b", 8, 4)]]


def test_a_block_is_hit_while_it_is_in_use_and_by_a_request_of_the_same_step():
    engine = Engine(Limits(max_num_seqs=3))
    prompt = list(range(1, 11))
    requests = [engine.add(name, prompt, max_tokens=3) for name in "ab"]
    engine.step(never_stop)
    assert engine.plans == [[("a", 0, 10), ("b", 8, 2)]]
    assert requests[0].block_ids[:2] == requests[1].block_ids[:2]
    requests.append(engine.add("c", prompt, max_tokens=3))
    engine.step(never_stop)
    assert requests[2].block_ids[:2] == requests[0].block_ids[:2]
    engine.drain()


def test_output_tokens_are_cached_too():
    engine = Engine()
    first = engine.add("a", 3, max_tokens=10)
    engine.drain()
    engine.add("b", first.token_ids, max_tokens=1)
    engine.step()
    assert engine.plans[-1] == [("b", 12, 1)]


def test_salts_keep_requests_apart():
    engine = Engine()
    prompt = list(range(1, 11))
    for name, salt in [("a", ""), ("b", "x"), ("c", "x")]:
        engine.add(name, prompt, max_tokens=1, salt=salt)
        engine.step()
    assert engine.plans == [[("a", 0, 10)], [("b", 0, 10)], [("c", 8, 2)]]


def test_a_prefix_is_only_used_from_its_start():
    engine = Engine(num_blocks=4)
    prompt = list(range(1, 13))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    engine.add("evicts", 7, max_tokens=1)  # takes the block that was never cached, and a's tail
    engine.drain()
    engine.add("b", [*prompt, 99], max_tokens=1)
    engine.step()
    assert engine.plans[-1] == [("b", 8, 5)]


def test_without_prefix_caching_everything_is_computed():
    engine = Engine(enable_prefix_caching=False)
    for name in "ab":
        engine.add(name, list(range(1, 11)), max_tokens=1)
    engine.step()
    assert engine.plans == [[("a", 0, 10), ("b", 0, 10)]]
    assert engine.scheduler.stats().prefix_cache_hits == 0


# Admission


def snapshot(engine: Engine) -> tuple:
    pool = engine.pool
    references = [pool.ref_count(block_id) for block_id in range(pool.num_blocks)]
    return references, list(pool._free), dict(pool._block_of_hash), engine.scheduler._num_seats_taken


def test_too_few_blocks_despite_hits_leave_everything_as_it_was():
    engine = Engine(Limits(max_num_batched_tokens=64), num_blocks=8)
    prompt = list(range(1, 9))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    engine.add("holder", 14, max_tokens=3)
    engine.step(never_stop)  # holds four blocks, four are free: two of them are cached
    blocked = engine.add("b", [*prompt, *range(20, 29)], max_tokens=1)
    before = snapshot(engine)
    plan = engine.scheduler.schedule()
    assert [entry.request.request_id for entry in plan.scheduled] == ["holder"]
    assert snapshot(engine) == before
    assert blocked.block_ids == []
    assert blocked.num_computed_tokens == 0
    assert engine.waiting() == [("b", 0)]
    engine.launch(plan)
    engine.drain()


def test_a_free_block_that_is_hit_still_counts_as_one_block():
    engine = Engine(num_blocks=6)
    prompt = list(range(1, 9))
    engine.add("a", prompt, max_tokens=1)
    engine.drain()
    engine.add("holder", 11, max_tokens=2)
    engine.step(never_stop)  # holds three, three are free, two of those cached
    engine.add("b", [*prompt, 99], max_tokens=1)  # three blocks, and one more for the holder to grow
    engine.step(never_stop)
    assert engine.plans[-1] == [("holder", 11, 1)]
    engine.drain()
    assert engine.plans[-1] == [("b", 8, 1)]


def test_a_prompt_is_admitted_only_if_all_of_it_fits_now():
    engine = Engine(Limits(max_num_batched_tokens=4), num_blocks=10)
    engine.add("a", 16, max_tokens=2)
    engine.add("b", 24, max_tokens=2)
    while ("a", 0) in engine.running() or not engine.plans:
        engine.step(never_stop)
        assert ("b", 0) in engine.waiting() or ("a", 0) not in engine.running()
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_blocks_promised_to_a_prompt_under_way_are_not_promised_again():
    engine = Engine(Limits(max_num_batched_tokens=16, long_prefill_token_threshold=4), num_blocks=12)
    engine.add("a", 32, max_tokens=1)
    engine.add("b", 32, max_tokens=1)
    engine.step()
    assert engine.running() == [("a", 0)], "eleven blocks are free, but seven of them are spoken for"
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


def test_a_group_is_admitted_with_a_block_for_each_of_its_samples():
    engine = Engine(num_blocks=9)
    engine.add("a", 6, n=4, max_tokens=3)
    engine.add("b", 6, n=4, max_tokens=3)
    engine.step(never_stop)
    assert engine.running() == [("a", index) for index in range(4)]
    engine.drain()
    assert engine.scheduler.num_preemptions == 0


# New weights


def test_recompute_drops_blocks_keeps_tokens_and_the_order_of_arrival():
    engine = Engine(Limits(max_num_seqs=3))
    requests = [engine.add(name, 6, max_tokens=6) for name in "abcd"]
    for _ in range(3):
        engine.step(never_stop)
    assert engine.set_weights(b"v1", "recompute") == 3 * 8
    assert engine.running() == []
    assert [name for name, _ in engine.waiting()] == ["a", "b", "c", "d"]
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    assert requests[0].num_output_tokens == 3
    engine.step(never_stop)
    assert engine.plans[-1] == [("a", 0, 9), ("b", 0, 9), ("c", 0, 9)], "nothing of the old weights is reused"
    for completion in engine.drain():
        assert completion.is_exact
        num_old = 3 if completion.request_id != "d" else 0
        assert completion.policy_versions == [0] * num_old + [1] * (6 - num_old)
    assert engine.scheduler.num_preemptions == 0


def test_keep_goes_on_where_it_was_and_marks_what_is_drawn():
    engine = Engine()
    engine.add("a", 6, n=2, max_tokens=6)
    engine.step(never_stop)
    assert engine.set_weights(b"v1", "keep") == 0
    engine.step(never_stop)
    assert engine.plans[-1] == [("a", 6, 1), ("a", 6, 1)]
    completions = engine.drain()
    assert [c.is_exact for c in completions] == [False, False]
    assert [c.policy_versions for c in completions] == [[0, 1, 1, 1, 1, 1]] * 2


def test_a_request_that_draws_nothing_after_keep_is_exact():
    engine = Engine()
    engine.add("a", 6, max_tokens=6)
    engine.step(never_stop)
    engine.set_weights(b"v1", "keep")
    [completion] = engine.scheduler.abort({"a"})
    assert completion.is_exact


def test_mixed_blocks_are_never_shared():
    engine = Engine()
    prompt = list(range(1, 7))
    engine.add("a", prompt, max_tokens=12)
    engine.step(never_stop)
    engine.set_weights(b"v1", "keep")
    for _ in range(6):
        engine.step(never_stop)
    engine.add("b", [*prompt, 7, 7, 7, 7, 7, 7], max_tokens=1)
    engine.step(never_stop)
    assert engine.plans[-1][-1] == ("b", 0, 12)
    engine.drain()


def test_a_request_kept_then_recomputed_shares_again_but_stays_marked():
    engine = Engine()
    request = engine.add("a", 6, max_tokens=9)
    engine.step(never_stop)
    engine.set_weights(b"v1", "keep")
    engine.step(never_stop)
    engine.set_weights(b"v2", "recompute")
    engine.step(never_stop)
    assert not request.has_mixed_kv
    assert engine.pool.lookup(request.block_hashes[0]) == request.block_ids[0]
    [completion] = engine.drain()
    assert not completion.is_exact


@pytest.mark.parametrize("mode", ["recompute", "keep"])
def test_weights_may_change_while_a_prompt_is_half_computed(mode):
    engine = Engine(Limits(max_num_batched_tokens=8))
    engine.add("a", 14, n=2, max_tokens=2)
    engine.step(never_stop)
    num_dropped = engine.set_weights(b"v1", mode)
    engine.step(never_stop)
    assert engine.plans[-1] == ([("a", 0, 8)] if mode == "recompute" else [("a", 8, 6)])
    assert num_dropped == (8 if mode == "recompute" else 0)
    completions = engine.drain()
    assert [c.is_exact for c in completions] == [mode == "recompute"] * 2
    assert [c.policy_versions for c in completions] == [[1, 1]] * 2


def test_cached_blocks_answer_to_their_own_weights_only():
    engine = Engine()
    prompt = list(range(1, 11))
    for name, checksum in [("a", None), ("b", b"v1"), ("c", b"v0")]:
        if checksum is not None:
            engine.set_weights(checksum, "recompute")
        engine.add(name, prompt, max_tokens=1)
        engine.step()
    assert engine.plans == [[("a", 0, 10)], [("b", 0, 10)], [("c", 8, 2)]]


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='wait'"):
        Engine().scheduler.set_weights(b"v1", "wait")


def test_weights_do_not_change_under_a_step():
    engine = Engine()
    engine.add("a", 6)
    engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="between two steps"):
        engine.scheduler.set_weights(b"v1", "recompute")


def test_a_step_that_failed_is_computed_again_from_nothing():
    engine = Engine(Limits(max_num_batched_tokens=8))
    prompt = list(range(1, 15))
    engine.add("a", prompt, n=2, max_tokens=3)
    engine.step(never_stop)
    engine.scheduler.schedule()  # registers blocks that are never written
    engine.scheduler.abandon_steps()
    engine.scheduler.check_integrity()
    engine.step(never_stop)
    assert engine.plans[-1] == [("a", 0, 8)]
    assert len(engine.drain()) == 2


# Errors


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        (0, {}, "empty prompt"),
        (64, {}, "64 tokens.*max_model_len=64"),
        (4, {"n": 9}, "n=9.*max_num_seqs=8"),
        (30, {"max_tokens": 20}, r"30 prompt tokens.*max_tokens=20 need 13 blocks of 4.*num_blocks=12"),
    ],
)
def test_a_request_that_can_never_be_served_is_refused_with_the_numbers(prompt, params, message):
    engine = Engine(num_blocks=12)
    with pytest.raises(ValueError, match=message):
        engine.add("a", prompt, **params)
    assert not engine.scheduler.has_unfinished()
    engine.scheduler.check_integrity()


def test_the_largest_request_that_fits_is_served():
    engine = Engine(num_blocks=12)
    engine.add("a", 30, max_tokens=19)
    engine.drain()


def test_an_id_in_use_is_refused_and_free_again_when_its_request_is_finished():
    engine = Engine()
    engine.add("a", 6, max_tokens=1)
    with pytest.raises(ValueError, match="'a' is in use"):
        engine.add("a", 6)
    engine.drain()
    engine.add("a", 6, max_tokens=1)
    engine.drain()


def test_stop_strings_without_a_tokenizer_are_refused():
    scheduler = Engine().scheduler
    leader = Request.create_group(
        request_id="a", prompt_token_ids=[1], params=SamplingParams(stop="x"), seed=0, tokenizer=None
    )
    with pytest.raises(ValueError, match=r"stop strings \['x'\].*stop_token_ids"):
        scheduler.add(leader)


def test_an_output_of_the_wrong_length_is_a_bug():
    engine = Engine()
    engine.add("a", 6, n=2)
    plan = engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="not one token for each sample"):
        engine.scheduler.update_from_output(plan, ModelRunnerOutput(token_ids=[1], logprobs=[-1.0], policy_version=0))


def test_a_third_step_before_the_output_of_the_first_is_a_bug():
    engine = Engine()
    engine.add("a", 6)
    engine.scheduler.schedule()
    engine.scheduler.schedule()
    with pytest.raises(AssertionError, match="has not been taken in"):
        engine.scheduler.schedule()


# Abort


def test_an_aborted_request_returns_what_every_unfinished_sample_has():
    engine = Engine()
    engine.add("a", 6, n=3, max_tokens=8)
    engine.add("b", 6, max_tokens=2)
    engine.step(lambda sample: EOS if sample.index == 1 else 65 + sample.index)
    completions = engine.scheduler.abort({"a"})
    engine.scheduler.check_integrity()
    assert [(c.index, c.finish_reason, c.token_ids, c.text) for c in completions] == [
        (0, "abort", [65], "A"),
        (2, "abort", [67], "C"),
    ]
    assert engine.running() == [("b", 0)]
    engine.drain()


def test_a_group_aborted_before_its_fork_returns_all_its_samples():
    engine = Engine(Limits(max_num_batched_tokens=4))
    engine.add("queued", 6, n=2)
    assert [c.index for c in engine.scheduler.abort({"queued"})] == [0, 1]
    engine.add("begun", 6, n=3)
    engine.step()
    completions = engine.scheduler.abort({"begun"})
    assert [(c.index, c.token_ids, c.finish_reason) for c in completions] == [(i, [], "abort") for i in range(3)]
    engine.scheduler.check_integrity()
    assert engine.pool.num_free_blocks == engine.pool.num_blocks
    assert engine.scheduler.stats().num_requests_running == 0


def test_a_preempted_request_can_be_aborted():
    engine = Engine(num_blocks=6)
    engine.add("a", 7, max_tokens=12)
    engine.add("b", 7, max_tokens=12)
    engine.run_until_preemption()
    [completion] = engine.scheduler.abort({"b"})
    assert len(completion.token_ids) > 0
    engine.drain()


def test_several_requests_are_aborted_in_order_of_arrival():
    engine = Engine()
    for name in ("z", "y", "x"):
        engine.add(name, 6, n=2)
    completions = engine.scheduler.abort(["x", "z"])
    assert [(c.request_id, c.index) for c in completions] == [("z", 0), ("z", 1), ("x", 0), ("x", 1)]


def test_an_unknown_id_is_named_and_nothing_is_aborted():
    engine = Engine()
    engine.add("a", 6, max_tokens=1)
    with pytest.raises(ValueError, match=r"\['c', 'd'\]"):
        engine.scheduler.abort({"a", "d", "c"})
    assert engine.scheduler.has_unfinished()
    engine.drain()
    with pytest.raises(ValueError, match=r"\['a'\]"):
        engine.scheduler.abort({"a"})


def test_a_token_drawn_for_an_aborted_request_is_dropped():
    engine = Engine()
    engine.add("a", 6, n=2, max_tokens=2)
    engine.add("b", 6, max_tokens=2)
    engine.launch(engine.scheduler.schedule())
    engine.scheduler.abort({"a"})
    step = engine.take_in(lambda sample: 40 + sample.index if sample.request_id == "a" else 50)
    assert [(token.request_id, token.token_id) for token in step.new_tokens] == [("b", 50)]
    engine.drain()


# Stop rules


@pytest.mark.parametrize(
    ("params", "drawn", "expected"),
    [
        ({"max_tokens": 3}, "abcdef", ("abc", "length", None, "abc")),
        ({"max_tokens": 3}, "ab\0", ("ab\0", "stop", None, "ab")),
        ({"max_tokens": 3}, "\0", ("\0", "stop", None, "")),
        ({"max_tokens": 3, "ignore_eos": True}, "a\0bc", ("a\0b", "length", None, "ab")),
        ({"stop_token_ids": [ord("c"), ord("b")]}, "abc", ("ab", "stop", ord("b"), "a")),
        ({"stop_token_ids": [EOS], "ignore_eos": True}, "a\0", ("a\0", "stop", EOS, "a")),
        ({"stop_token_ids": [EOS]}, "a\0", ("a\0", "stop", None, "a")),
        ({"stop": "cd"}, "abcde", ("abcd", "stop", "cd", "ab")),
        ({"stop": ["x", "d", "cd"]}, "abcde", ("abcd", "stop", "cd", "ab")),
        ({"stop": "b", "stop_token_ids": [ord("b")]}, "ab", ("ab", "stop", ord("b"), "a")),
        ({"stop": "abc", "max_tokens": 3}, "abc", ("abc", "stop", "abc", "")),
        ({"stop": "abc", "max_tokens": 2}, "abc", ("ab", "length", None, "ab")),
        ({"min_tokens": 2}, "\0a\0", ("\0a\0", "stop", None, "a")),
        ({"min_tokens": 2}, "a\0", ("a\0", "stop", None, "a")),
        ({"min_tokens": 2, "stop_token_ids": [ord("a")]}, "aba", ("aba", "stop", ord("a"), "ab")),
        ({"min_tokens": 3, "stop": "b"}, "bbcb", ("bbcb", "stop", "b", "bbc")),
        ({"min_tokens": 3, "stop": "bcd"}, "abcd", ("abcd", "stop", "bcd", "a")),
        ({"min_tokens": 2, "max_tokens": 2, "stop": "b"}, "bc", ("bc", "length", None, "bc")),
    ],
)
def test_stop_rules(params, drawn, expected):
    engine = Engine()
    engine.add("a", 5, **params)
    tokens = iter(drawn)
    while engine.scheduler.has_unfinished():
        engine.step(lambda sample: ord(next(tokens)))
    [c] = engine.finished
    assert ("".join(map(chr, c.token_ids)), c.finish_reason, c.stop_reason, c.text) == expected
    assert len(c.logprobs) == len(c.policy_versions) == len(c.token_ids)


def test_a_completion_ends_where_the_context_does():
    engine = Engine(Limits(max_model_len=10))
    engine.add("a", 7, max_tokens=100)
    [completion] = engine.drain()
    assert len(completion.token_ids) == 3
    assert completion.finish_reason == "length"


def test_without_a_tokenizer_there_is_no_text():
    request = Request(request_id="a", prompt_token_ids=[1], params=SamplingParams(max_tokens=1))
    request.append_token(5, -1.0, 0)
    assert request.check_stop(10)
    assert request.to_completion(end=0.0).text == ""


def test_a_stop_string_survives_preemption_between_its_tokens():
    engine = Engine(num_blocks=6)
    engine.add("a", 7, max_tokens=12)
    later = engine.add("b", 7, max_tokens=12, stop="wxyz", min_tokens=2)
    letters = {"a": iter("?" * 12), "b": iter("abcwxyz")}
    while engine.scheduler.has_unfinished():
        engine.step(lambda sample: ord(next(letters[sample.request_id])))
        if later.status is RequestStatus.PREEMPTED:
            assert later.output_token_ids == [ord(letter) for letter in "abcwxy"]
    assert later.num_preemptions == 1
    assert {c.request_id: (c.text, c.stop_reason) for c in engine.finished}["b"] == ("abc", "wxyz")


def test_every_sample_has_its_own_detokenizer():
    leader = Request.create_group(
        request_id="a", prompt_token_ids=[1], params=SamplingParams(n=3), seed=0, tokenizer=Characters()
    )
    detokenizers = [request.detokenizer for request in (leader, *leader.siblings)]
    assert all(isinstance(detokenizer, Detokenizer) for detokenizer in detokenizers)
    assert len(set(map(id, detokenizers))) == 3


# Counters


def test_counters_add_up():
    engine = Engine(Limits(max_num_batched_tokens=8))
    engine.add("a", 10, n=2, max_tokens=3)
    engine.step(never_stop)
    stats = engine.scheduler.stats(policy_version=4)
    assert (stats.num_requests_running, stats.num_requests_waiting) == (2, 0)
    assert (stats.num_blocks, stats.num_free_blocks, stats.kv_cache_usage) == (64, 62, 2 / 64)
    assert (stats.num_steps, stats.num_scheduled_tokens, stats.num_generated_tokens) == (1, 8, 0)
    assert stats.policy_version == 4
    engine.drain()
    stats = engine.scheduler.stats()
    assert (stats.num_requests_running, stats.num_steps) == (0, 4)
    assert (stats.num_scheduled_tokens, stats.num_generated_tokens) == (10 + 2 * 2, 6)
