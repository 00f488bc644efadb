"""The benchmarks run and write what they measured; what is fast is not judged here."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from scripts import bench_grpo_step, bench_rollout, timing


@pytest.mark.slow
def test_rollout_benchmark_times_every_contender_on_the_same_jobs(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    loads = [
        dataclasses.replace(
            load, num_prompts=min(2, load.num_prompts), group_size=min(2, load.group_size), max_tokens=4
        )
        for load in bench_rollout.LOADS
    ]
    options = bench_rollout.Options(
        model=str(tiny_model_dir("llama")),
        numerics=("float32", "bfloat16-dot"),
        repetitions=2,
        peer_dtypes=("float32",),
        output=tmp_path / "rollout.json",
    )
    bench_rollout.main(options, loads)
    result = json.loads(options.output.read_text())
    assert list(result["tokens_per_second"]) == [load.name for load in loads]
    for speeds in result["tokens_per_second"].values():
        assert sorted(speeds) == ["Lockstep bfloat16-dot", "Lockstep float32", "transformers float32"]
        assert all(len(contender["values"]) == 2 and min(contender["values"]) > 0 for contender in speeds.values())
    assert sorted(result["share_of_read_floor"]) == ["Lockstep bfloat16-dot", "Lockstep float32"]


@pytest.mark.slow
def test_step_benchmark_reports_a_step_in_lockstep(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    options = bench_grpo_step.Options(
        model=str(tiny_model_dir("llama")),
        numerics=("float32",),
        num_prompts=2,
        group_size=2,
        repetitions=1,
        output=tmp_path / "step.json",
    )
    bench_grpo_step.main(options)
    result = json.loads(options.output.read_text())
    assert result["seconds"]["Lockstep float32"]["median"] > 0
    assert result["steps"][0]["Lockstep float32"]["mismatch/logprob_abs_diff_max"] == 0.0


def test_ratios_compare_neighbours_in_time():
    assert timing.ratios([2.0, 9.0], [1.0, 3.0]) == [2.0, 3.0]


def test_a_contender_that_dies_is_named_with_the_end_of_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "broken.py").write_text("raise SystemExit('out of luck')")
    monkeypatch.setattr(timing, "CONTENDERS", tmp_path)
    contender = timing.Contender("the broken one", "broken.py")
    with pytest.raises(RuntimeError, match=r"the broken one ended with exit code 1:\nout of luck"):
        contender.wait_until_ready()
    contender.close()
