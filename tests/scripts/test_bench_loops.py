from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from recipes.options import parse_options
from scripts.bench_loops import Options, command, table, timed

OPTIONS = Options(num_prompts=2, group_size=4, num_steps=4, skipped_steps=2)


def step(number: int, seconds: float) -> dict[str, float]:
    return {
        "step": number,
        "timing_s/step": seconds,
        "timing_s/rollout": seconds / 4,
        "timing_s/train": seconds / 2,
        "staleness/mean": float(number),
        "mismatch/logprob_abs_diff_max": 0.0,
    }


def test_the_first_steps_are_not_timed():
    run = timed("async", OPTIONS, [{"step": 0}, step(1, 50.0), step(2, 9.0), step(3, 2.0), step(4, 6.0)])
    assert (run.seconds, run.samples_per_second) == (8.0, 2 * 8 / 8.0)
    assert (run.rollout_share, run.train_share, run.staleness_mean) == (0.25, 0.5, 3.5)


@pytest.mark.parametrize("mode", ["sync", "lagged", "async"])
def test_the_recipe_takes_every_run(mode, tmp_path: Path):
    arguments = command(mode, OPTIONS, tmp_path)
    options = parse_options(arguments[arguments.index("recipes.grpo_math") + 1 :])
    assert (options.loop.mode, options.sampling.num_prompts, options.training.eval_every) == (mode, 2, 0)
    assert options.engine.num_threads == (None if mode == "sync" else 1)


def test_speeds_are_compared_with_the_first_mode():
    runs = [timed(mode, OPTIONS, [step(3, s), step(4, s)]) for mode, s in (("sync", 4.0), ("async", 2.0))]
    console = Console(record=True, width=120)
    console.print(table(runs, OPTIONS))
    assert "2.00" in console.export_text()
