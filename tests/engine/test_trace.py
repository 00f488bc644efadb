"""A trace shows what each step did and when, and that steps overlap where they should."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engine import EngineConfig, LLMEngine, SamplingParams
from engine.trace import LANES, Trace

PARAMS = SamplingParams(max_tokens=24, seed=1, ignore_eos=True)


def traced(directory: Path, path: Path, **options: Any) -> LLMEngine:
    return LLMEngine(EngineConfig(str(directory), num_threads=1, trace_path=path, **options))


def spans(path: Path) -> list[dict[str, Any]]:
    events = json.loads(path.read_text())["traceEvents"]
    lanes = {event["tid"]: event["args"]["name"] for event in events if event["name"] == "thread_name"}
    assert tuple(lanes[tid] for tid in sorted(lanes)) == LANES
    return [{**event, "lane": lanes[event["tid"]]} for event in events if event["ph"] == "X"]


@pytest.mark.parametrize("is_async", [False, True])
def test_every_step_is_scheduled_executed_sampled_and_taken_in(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, is_async: bool
) -> None:
    engine = traced(tiny_model_dir(), tmp_path / "trace.json", async_scheduling=is_async)
    engine.generate([[5, 6, 7], [8, 9]], PARAMS)
    found = spans(engine.write_trace())
    num_steps = engine.stats().num_steps
    by_name = {name: [span for span in found if span["name"] == name] for name in ("execute", "sample", "update")}
    assert [span["args"]["step"] for span in by_name["execute"]] == list(range(1, num_steps + 1))
    assert len(by_name["sample"]) == len(by_name["update"]) == num_steps
    assert {span["lane"] for span in by_name["update"]} == {"schedule"}
    assert by_name["execute"][0]["args"]["num_scheduled_tokens"] == 5
    assert all(span["dur"] >= 0 for span in found)


def test_the_next_step_is_planned_while_one_runs_and_only_where_that_was_asked_for(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    for is_async in (False, True):
        engine = traced(tiny_model_dir(), tmp_path / f"{is_async}.json", async_scheduling=is_async)
        engine.generate([[5 + i] * 20 for i in range(16)], PARAMS)
        found = spans(engine.write_trace())
        runs = [(span["ts"], span["ts"] + span["dur"]) for span in found if span["name"] == "execute"]
        plans = [span["ts"] for span in found if span["name"] == "schedule"]
        assert any(start < plan < end for plan in plans for start, end in runs) == is_async


def test_the_file_is_written_when_the_process_ends(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    code = (
        "import sys; from engine import EngineConfig, LLMEngine, SamplingParams\n"
        "engine = LLMEngine(EngineConfig(sys.argv[1], num_threads=1, trace_path=sys.argv[2]))\n"
        "engine.generate([[5, 6]], SamplingParams(max_tokens=2))\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tiny_model_dir()), str(tmp_path / "t-{pid}.json")], check=True)
    [path] = tmp_path.glob("t-*.json")
    assert "{pid}" not in path.name
    assert spans(path)


def test_a_trace_keeps_the_latest_spans_and_says_how_many_it_dropped(tmp_path: Path) -> None:
    trace = Trace(max_spans=3)
    for number in range(5):
        trace.add("execute", number, number + 0.5)
    trace.write(tmp_path / "trace.json")
    assert [span["ts"] for span in spans(tmp_path / "trace.json")] == [2e6, 3e6, 4e6]
    assert json.loads((tmp_path / "trace.json").read_text())["otherData"] == {"num_dropped_spans": 2}


def test_mistakes_are_named(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"trace_path=.*there is no directory"):
        traced(tiny_model_dir(), tmp_path / "nowhere" / "trace.json")
    with pytest.raises(ValueError, match="nothing was recorded: give EngineConfig"):
        LLMEngine(EngineConfig(str(tiny_model_dir()))).write_trace()
