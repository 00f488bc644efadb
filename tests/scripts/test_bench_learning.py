from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from scripts import bench_learning
from scripts.bench_learning import ALGORITHMS, RUNS, Options, Run, make, outcome
from trainers import ALGORITHMS as PUBLISHED

HISTORY = [
    {"step": 0, "eval/expected_reward": 0.25},
    {"step": 1, "mismatch/logprob_abs_diff_max": 0.0, "mismatch/num_tokens": 10, "timing_s/step": 2.0},
    {"step": 2, "mismatch/logprob_abs_diff_max": None, "mismatch/num_tokens": 0, "timing_s/step": 1.0},
    {"step": 3, "mismatch/logprob_abs_diff_max": 0.5, "mismatch/num_tokens": 5, "eval/expected_reward": 0.75},
]


def test_every_published_algorithm_is_run():
    assert set(ALGORITHMS) == set(PUBLISHED)
    assert set(ALGORITHMS) < set(RUNS)


def test_an_outcome_is_what_the_metrics_say():
    seen = outcome("grpo", HISTORY)
    assert (seen.steps, seen.expected_reward, seen.gain) == ([0, 3], [0.25, 0.75], 0.5)
    assert (seen.largest_mismatch, seen.num_compared_tokens, seen.seconds) == (0.5, 15, 3.0)


def test_a_run_that_has_ended_is_not_made_again_and_one_that_failed_is(tmp_path: Path):
    directory = tmp_path / "run"
    lines = "\n".join(map(json.dumps, HISTORY))
    program = (
        "import pathlib, sys; d = pathlib.Path(sys.argv[1]); d.mkdir(exist_ok=True); new = not (d / 'once').exists(); "
        f"(d / 'once').touch(); (d / 'metrics.jsonl').write_text({lines!r}); sys.exit(3 if new else 0)"
    )

    class Stub(Run):
        def command(self, directory):
            calls.append(directory)
            return [sys.executable, "-c", program, str(directory)]

    calls: list = []
    run = Stub(name="grpo", recipe="grpo_math", arguments=())
    with pytest.raises(bench_learning.subprocess.CalledProcessError):
        make(run, directory)
    assert make(run, directory) == make(run, directory) == outcome("grpo", HISTORY)
    assert len(calls) == 2


def test_the_curves_are_drawn(tmp_path: Path):
    bench_learning.draw([outcome("grpo", HISTORY), outcome("grpo-shuffled", HISTORY)], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_unknown_runs_are_named():
    with pytest.raises(ValueError, match=r"no runs \['ppo2'\]; there are grpo,"):
        Options(runs=("ppo2",))
