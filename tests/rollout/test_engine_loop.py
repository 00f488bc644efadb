from __future__ import annotations

import threading
import time
import traceback

import pytest

from engine import LLMEngine, SamplingParams
from rollout.engine_loop import EngineLoop, EngineStoppedError
from rollout.requests import GroupRequest

SECONDS = 20.0


def group(group_id: str, **params) -> GroupRequest:
    defaults = {"n": 2, "max_tokens": 6, "seed": 3, "ignore_eos": True}
    return GroupRequest(group_id=group_id, prompt_token_ids=[5, 6, 7], params=SamplingParams(**(defaults | params)))


def collect_all(loop: EngineLoop, call_id: str, num_groups: int) -> list:
    results = []
    while len(results) < num_groups:
        answer = loop.collect(call_id, SECONDS)
        assert answer, "nothing arrived in time"
        results += answer
    return results


@pytest.fixture
def loop(config) -> EngineLoop:
    loop = EngineLoop(lambda: LLMEngine(config))
    loop.start()
    return loop


def test_callers_get_their_own_groups_whole_and_by_sample_index(loop):
    loop.submit("one", [group("a", max_tokens=30), group("b")])
    loop.submit("two", [group("c", n=3)])
    assert [r.group_id for r in collect_all(loop, "two", 1)] == ["c"]
    results = collect_all(loop, "one", 2)
    assert sorted(r.group_id for r in results) == ["a", "b"]
    assert all([c.index for c in result.completions] == [0, 1] for result in results)
    assert loop.collect("one", 0.0) == []
    loop.run(lambda engine: engine.check_integrity())


def test_commands_run_between_steps_while_requests_are_in_flight(loop):
    loop.submit("call", [group("a", max_tokens=300)])
    running = [loop.run(lambda engine: engine.stats().num_generated_tokens) for _ in range(5)]
    assert running == sorted(running)
    assert running[-1] < 600
    assert len(collect_all(loop, "call", 1)[0].completions) == 2


def test_a_refused_group_is_a_value_error_of_its_call_alone(loop):
    loop.submit("good", [group("a")])
    loop.submit("bad", [group("b"), group("c", n=10_000)])
    with pytest.raises(ValueError, match="max_num_seqs"):
        loop.collect("bad", SECONDS)
    loop.forget("bad")
    assert len(collect_all(loop, "good", 1)) == 1
    assert not loop.run(lambda engine: engine.has_unfinished())


def test_aborted_and_forgotten_groups_leave_the_engine(loop):
    loop.submit("call", [group("a", max_tokens=400), group("b", max_tokens=400)])
    assert loop.abort(["a", "unknown"]) == ["a"]
    assert loop.abort(["a", "unknown"]) == ["a"]  # it has ended, and nobody has collected it
    (result,) = loop.collect("call", SECONDS)
    assert {c.finish_reason for c in result.completions} == {"abort"}
    loop.forget("call")
    assert loop.collect("call", 0.0) == []
    assert loop.run(lambda engine: (engine.check_integrity(), engine.stats().num_free_blocks))[1] == 512


def test_a_failing_step_reaches_everybody_with_its_cause(config):
    class Failing(LLMEngine):
        def step(self):
            raise MemoryError("no more of it")

    loop = EngineLoop(lambda: Failing(config))
    loop.start()
    caught: list[BaseException] = []

    def wait():
        try:
            loop.collect("call", SECONDS)
        except EngineStoppedError as error:
            caught.append(error)

    loop.submit("call", [group("a")])
    waiting = threading.Thread(target=wait)
    start = time.monotonic()
    waiting.start()
    waiting.join()
    assert time.monotonic() - start < SECONDS / 2
    assert isinstance(caught[0].__cause__, MemoryError)
    assert "no more of it" in "".join(traceback.format_exception(caught[0]))
    with pytest.raises(EngineStoppedError, match="MemoryError: no more of it"):
        loop.run(lambda engine: engine.stats())
    with pytest.raises(EngineStoppedError):
        loop.submit("later", [group("b")])


def test_a_failing_build_is_raised_by_start():
    loop = EngineLoop(lambda: (_ for _ in ()).throw(OSError("no such model")))
    with pytest.raises(OSError, match="no such model"):
        loop.start()
