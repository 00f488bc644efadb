"""The V0-style loop draws what the engine draws, the stand-in is the same device to all, and the figures add up."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from engine.step_plan import SchedulerOutput
from scripts.bench_scheduling import loads, overhead, stream
from scripts.bench_scheduling.comparison import compare
from scripts.bench_scheduling.loads import Arrival, Load
from scripts.bench_scheduling.replay import (
    Figures,
    Loop,
    Record,
    between_tokens,
    figures_of,
    median_figures,
    percentile,
    replay,
)
from scripts.bench_scheduling.stand_in import StandIn
from scripts.bench_scheduling.v0_loop import V0Loop
from scripts.bench_scheduling.variants import TINY, V0, V1, VARIANTS, Setting, Variant, start, v0_loop

PROFILES = ("float32", "bfloat16-dot")


@pytest.fixture(params=PROFILES)
def make_engine(tiny_model_dir: Callable[..., Path], request: pytest.FixtureRequest) -> Callable[..., LLMEngine]:
    def make(**options: object) -> LLMEngine:
        defaults = {"num_blocks": 200, "max_model_len": 200, "max_num_batched_tokens": 200, "numerics": request.param}
        return LLMEngine(EngineConfig(str(tiny_model_dir("llama")), **{**defaults, **options}))

    return make


def requests(count: int) -> dict[str, tuple[list[int], SamplingParams]]:
    """Groups and single samples of several lengths and temperatures; some meet the model's end token."""
    draw = random.Random(0)
    return {
        f"r{i}": (
            [draw.randrange(3, 300) for _ in range(draw.randrange(1, 90))],
            SamplingParams(n=1 + i % 3, max_tokens=draw.randrange(1, 40), temperature=(1.0, 0.0, 0.7)[i % 3], seed=i),
        )
        for i in range(count)
    }


def run(loop: Loop, count: int = 12) -> dict[tuple[str, int], tuple[list[int], list[int], str]]:
    """Token ids, bits of log-probabilities and the reason of the end, by sample."""
    for request_id, request in requests(count).items():
        loop.add_request(request_id, *request)
    done: list[Completion] = []
    while loop.has_unfinished():
        done += loop.step().finished
    assert len(done) == sum(params.n for _, params in requests(count).values())
    return {(one.request_id, one.index): (one.token_ids, bits(one.logprobs), one.finish_reason) for one in done}


def bits(values: Iterable[float]) -> list[int]:
    return np.array(list(values), np.float32).view(np.int32).tolist()


# The V0-style loop


def test_v0_loop_gives_the_engines_tokens_and_logprobs(make_engine):
    expected = run(make_engine(max_num_batched_tokens=32))
    assert run(v0_loop(make_engine())) == expected


def test_preemption_in_the_v0_loop_changes_no_bit_and_loses_no_block(make_engine):
    engine = make_engine(num_blocks=14, max_model_len=150)
    loop = v0_loop(engine)
    preempted = spy_on_preemptions(loop)
    assert run(loop) == run(engine)
    assert preempted
    assert loop.scheduler.block_pool.num_free_blocks == 14
    loop.scheduler.block_pool.check_integrity([])


def spy_on_preemptions(loop: V0Loop) -> list[str]:
    preempt, names = loop.scheduler._preempt, []
    loop.scheduler._preempt = lambda request: (names.append(request.request_id), preempt(request))
    return names


def test_a_v0_step_computes_whole_prompts_or_one_token_of_everybody(make_engine):
    loop = v0_loop(make_engine())
    plans = spy_on_plans(loop)
    loop.add_request("early", [5] * 20, SamplingParams(max_tokens=30, ignore_eos=True))
    for _ in range(3):
        loop.step()
    loop.add_request("group", [6] * 70, SamplingParams(n=3, max_tokens=30, ignore_eos=True))
    while loop.has_unfinished():
        loop.step()
    shapes = [[(entry.request.request_id, entry.num_tokens) for entry in plan.scheduled] for plan in plans]
    assert shapes[:3] == [[("early", 20)], [("early", 1)], [("early", 1)]]
    assert shapes[3:6] == [[("group", 70)] * 2, [("group", 70)], [("early", 1)] + [("group", 1)] * 3]
    assert all(not plan.block_copies for plan in plans)


def spy_on_plans(loop: V0Loop) -> list[SchedulerOutput]:
    schedule, plans = loop.scheduler.schedule, []
    loop.scheduler.schedule = lambda: plans.append(schedule()) or plans[-1]
    return plans


def test_samples_of_a_group_share_no_block_in_the_v0_loop(make_engine):
    loop = v0_loop(make_engine())
    loop.add_request("group", [6] * 40, SamplingParams(n=4, max_tokens=30, ignore_eos=True))
    loop.step()
    tables = [request.block_ids for request in loop.scheduler.running]
    assert [len(table) for table in tables] == [3, 3, 3, 3]
    assert len({block_id for table in tables for block_id in table}) == 12


def test_the_v0_loop_refuses_what_could_never_run(make_engine):
    with pytest.raises(ValueError, match="max_num_batched_tokens=100 is less than max_model_len=200"):
        v0_loop(make_engine(max_num_batched_tokens=100))
    loop = v0_loop(make_engine(num_blocks=4))
    with pytest.raises(ValueError, match=r"'long' of 90 tokens can never run.*4 blocks of 16 tokens"):
        loop.add_request("long", [5] * 60, SamplingParams(max_tokens=30))
    assert not loop.has_unfinished()


# The stand-in


def test_all_variants_draw_the_same_tokens_of_a_stand_in():
    options = {"num_blocks": 200, "max_num_batched_tokens": 64, "num_threads": 1}
    setting = Setting(model=TINY, max_model_len=200, options=options, step_seconds=0.0)
    drawn = [run(start(setting, variant)[0]) for variant in VARIANTS]
    assert all(one == drawn[0] for one in drawn)
    assert len({tuple(token_ids) for token_ids, _, _ in drawn[0].values()}) > 20


def test_a_stand_in_takes_its_time_for_every_step():
    config = EngineConfig("stand-in", max_model_len=64, max_num_batched_tokens=64)
    runner = StandIn(0.002, config)
    loop = V0Loop(runner, config, num_blocks=40)
    loop.add_request("a", [5, 6], SamplingParams(max_tokens=5, ignore_eos=True))
    while loop.has_unfinished():
        loop.step()
    assert loop.scheduler.num_steps == 5
    assert runner.slept_seconds >= 5 * 0.002


# Figures


def arrival(seconds: float, kind: loads.Kind = "chat") -> Arrival:
    return Arrival(seconds=seconds, kind=kind, prompt_token_ids=[5], params=SamplingParams(seed=1))


def test_figures_are_those_of_the_record():
    load = Load(title="three", arrivals=[arrival(0.0), arrival(1.0), arrival(0.5, "document")], num_requests=3)
    record = Record(
        seconds=4.0,
        token_seconds={(0, 0): [0.5, 0.75, 1.0], (1, 0): [1.25, 2.25], (2, 0): [3.0, 4.0]},
        peak_blocks=7,
    )
    figures = figures_of(record, load)
    assert figures.requests_per_second == 3 / 4
    assert figures.tokens_per_second == 7 / 4
    assert figures.between_tokens_p50 == 250.0  # of 250, 250 and 1000: the document's do not count
    assert figures.between_tokens_p99 == pytest.approx(1000 - 0.02 * 750)
    assert figures.longest_gap_p50 == (250 + 1000) / 2  # of the two chats
    assert figures.longest_gap_p99 == pytest.approx(1000 - 0.01 * 750)
    assert figures.first_token_p99 == pytest.approx(250 + 0.99 * 250)  # of 250 and 500
    assert figures.peak_blocks == 7


def test_gaps_percentiles_and_medians():
    assert between_tokens([1.0, 1.5, 1.5, 4.0]) == [0.5, 0.0, 2.5]
    assert between_tokens([1.0]) == []
    assert percentile(range(101), 99) == 99.0
    assert percentile([], 99) == 0.0
    assert median_figures([figures(value) for value in (1.0, 9.0, 2.0)]) == figures(2.0)


def figures(value: float) -> Figures:
    return Figures(**dict.fromkeys(Figures.__dataclass_fields__, value))


def test_a_replay_gives_every_token_a_time_after_its_requests_arrival(make_engine):
    engine = make_engine()
    load = Load(title="two", arrivals=[arrival(0.0), arrival(0.05)], num_requests=2)
    record = replay(engine, engine.scheduler.block_pool, load)
    assert sorted(record.token_seconds) == [(0, 0), (1, 0)]
    for (place, _), times in record.token_seconds.items():
        assert len(times) <= 16
        assert times == sorted(times)
        assert times[0] >= load.arrivals[place].seconds
    assert record.seconds == max(times[-1] for times in record.token_seconds.values())
    assert record.peak_blocks >= 1


def test_loads_are_the_same_for_the_same_seed_and_in_order_of_time():
    load = loads.stream(50.0, chats_per_second=20.0, documents_per_second=1.0, seed=3)
    assert load == loads.stream(50.0, 20.0, 1.0, seed=3)
    times = [one.seconds for one in load.arrivals]
    assert times == sorted(times)
    assert 0 < times[0] < times[-1] < 50
    assert 800 < sum(one.kind == "chat" for one in load.arrivals) < 1200
    assert 40 < sum(one.kind == "document" for one in load.arrivals) < 60
    assert {len(one.prompt_token_ids) for one in load.arrivals} == {64, 4096}


def test_a_group_becomes_requests_of_their_own():
    load = loads.groups(2, 3, 8, 20, seed=0).without_groups()
    assert load.num_requests == 2
    assert [one.params.n for one in load.arrivals] == [1] * 6
    assert len({one.params.seed for one in load.arrivals}) == 6
    assert load.arrivals[0].prompt_token_ids == load.arrivals[2].prompt_token_ids != load.arrivals[3].prompt_token_ids


@pytest.mark.slow
def test_a_comparison_has_a_row_of_every_variant_and_its_ratio_in_each_turn():
    options = {"num_blocks": 200, "max_num_batched_tokens": 64, "num_threads": 1}
    setting = Setting(model=TINY, max_model_len=64, options=options, step_seconds=0.001)
    whole = Variant(name="whole", is_whole=True)
    comparison = compare(
        setting, lambda seed: loads.burst(8, 16, 8, seed), loads.burst(2, 16, 4, seed=9), 2,
        lambda turn: (V0, V1) if turn else (V0, V1, whole),
    )  # fmt: skip
    assert comparison.table().row_count == 3
    content = json.loads(json.dumps(comparison.as_json()))
    assert content["over_v0"]["V0-style loop"]["requests_per_second"] == [1.0, 1.0]
    turns = content["turns"]
    assert [len(turns[variant.name]) for variant in (V0, V1, whole)] == [2, 2, 1]
    assert all(turn["tokens_per_second"] == pytest.approx(8 * turn["requests_per_second"]) for turn in turns[V1.name])


def test_a_streams_pieces_are_the_smallest_that_keep_a_document_within_the_limit():
    assert stream.smallest_piece(lambda piece: 1 + 80 / piece) == (384, 1 + 80 / 384)
    assert stream.smallest_piece(lambda piece: 1.0) == (64, 1.0)
    with pytest.raises(ValueError, match=r"2\.00 times"):
        stream.smallest_piece(lambda piece: 2.0)


# The host's work


def test_growth_of_a_power_is_its_exponent():
    assert overhead.growth_exponent([1, 4, 16], [0.5, 2.0, 8.0]) == pytest.approx(1.0)
    assert overhead.growth_exponent([1, 4, 16], [1.0, 16.0, 256.0]) == pytest.approx(2.0)


@pytest.mark.slow
def test_the_hosts_work_is_measured_on_steps_that_decode():
    assert 0 < overhead.scheduler_milliseconds(4) < overhead.scheduler_milliseconds(64)
    for is_v0 in (True, False):
        parts = overhead.host_parts(4, is_v0)
        assert list(parts) == list(overhead.PARTS)
        assert min(parts.values()) > 0
