"""Every section runs at a toy size and its figures add up; what is fast is not judged here."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from engine import EngineConfig, SamplingParams
from scripts.bench_pool import operations, overlap
from scripts.bench_pool.__main__ import Options, main
from scripts.bench_pool.scale import Load, requests
from scripts.bench_pool.stub import StubEngine


@pytest.fixture
def stub(tmp_path: Path) -> StubEngine:
    return StubEngine(EngineConfig(str(tmp_path), max_num_seqs=2, num_threads=1), step_seconds=0.0)


def ends(engine: StubEngine) -> list[tuple[int, str, int, int]]:
    """(step, request, sample, tokens) of every sample, in the order in which they end."""
    seen, number = [], 0
    while engine.can_step():
        number += 1
        seen += [(number, one.request_id, one.index, len(one.token_ids)) for one in engine.step().finished]
        engine.check_integrity()
    return seen


def test_a_stub_gives_each_seat_a_token_a_step_and_a_free_seat_to_the_next(stub):
    stub.add_request("a", [1], SamplingParams(n=2, max_tokens=3))
    stub.add_request("b", [1], SamplingParams(n=3, max_tokens=2))
    assert ends(stub) == [(3, "a", 0, 3), (3, "a", 1, 3), (5, "b", 0, 2), (5, "b", 1, 2), (7, "b", 2, 2)]


def test_a_stub_ends_aborted_requests_at_once_and_frees_their_seats(stub):
    stub.add_request("a", [1], SamplingParams(n=3, max_tokens=9))
    stub.step()
    aborted = stub.abort(["a"])
    assert sorted((one.request_id, one.index, one.finish_reason) for one in aborted) == [
        ("a", index, "abort") for index in range(3)
    ]
    stub.check_integrity()
    assert not stub.can_step()
    stub.add_request("b", [1], SamplingParams(max_tokens=2))
    assert ends(stub) == [(2, "b", 0, 2)]


def test_sample_lengths_have_the_mean_of_which_the_ideal_is_reckoned():
    _, params = requests(mean_tokens=16, num_groups=4000, group_size=1, seed=0)
    assert sum(one.max_tokens for one in params) / 4000 == pytest.approx(16, rel=0.02)
    assert Load(seats=32, mean_tokens=16, step_seconds=0.02, seconds=1.0).ideal(4) == pytest.approx(400)


def test_response_lengths_are_lognormal_with_a_99th_percentile_of_eight_medians():
    job = overlap.Job(device=overlap.H100_8B, num_engines=1, batch_size=500, num_batches=100, median_tokens=100)
    lengths = sorted(overlap.Work.draw(job, seed=0).lengths)
    assert lengths[25_000] == pytest.approx(100, rel=0.03)
    assert lengths[49_500] == pytest.approx(800, rel=0.1)
    assert lengths[-1] == job.max_tokens


def test_the_router_is_timed_with_as_many_engines_and_groups_as_asked_for():
    cost = operations.router_cost(num_engines=5, num_running=100, has_shared_beginning=True)
    assert (cost.num_engines, cost.num_running) == (5, 100)
    assert min(cost.reserve, cost.assign, cost.release) > 0


@pytest.mark.slow
def test_every_section_measures_what_it_says(local_ray, tmp_path: Path):
    options = Options(
        engines=(1, 2),
        group_sizes=(2,),
        seconds=0.3,
        step_seconds=0.005,
        repetitions=1,
        idle_seconds=0.1,
        syncs=1,
        backlog_prompts=400,
        backlog_engines=1,
        router_engines=(1, 3),
        router_running=(10,),
        message_tokens=4,
        max_staleness=(1,),
        seeds=1,
        batch_size=4,
        batches=3,
        median_tokens=3,
        async_engines=1,
        output=tmp_path / "pool.json",
    )
    main(options)
    result = json.loads(options.output.read_text())
    check_scale(result["scale"])
    assert [(run["kind"], run["num_prompts"]) for run in result["backlog"]] == [("iterator", 400), ("list", 400)]
    assert all(len(run["driver_growth"]) == 10 for run in result["backlog"])
    assert {cost["num_engines"] for cost in result["operations"]["router"]} == {1, 3}
    assert all(message["num_bytes"] > 0 for message in result["operations"]["messages"])
    check_async(result["async"], options)


def check_scale(figures: dict) -> None:
    runs = figures["runs"]
    assert [run["num_engines"] for run in runs] == [1, 2]
    assert runs[1]["ideal"] == 2 * runs[0]["ideal"]
    for run in runs:
        assert run["num_rollouts"] <= run["ideal"] * run["seconds"], "more than engines that sleep can draw"
        assert run["cpu_seconds"]["driver"] > 0
    assert [row["num_engines"] for row in figures["upkeep"]] == [1, 2]


def check_async(figures: dict, options: Options) -> None:
    assert list(figures["runs"]) == ["synchronous", "max_staleness 1"]
    [synchronous], [asynchronous] = figures["runs"].values()
    for run in (synchronous, asynchronous):
        assert run["num_samples"] == options.batch_size * options.batches
        assert len(run["sync_seconds"]) == options.batches
    assert synchronous["num_tokens"] == asynchronous["num_tokens"]
    assert synchronous["staleness_max"] == 0
    assert asynchronous["staleness_max"] <= 1
