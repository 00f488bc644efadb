from __future__ import annotations

import io

import pytest
from rich.console import Console

from recipes.display import (
    EXPECTED_REWARD,
    MISMATCH,
    RESPONSE_LENGTH,
    REWARD,
    ROLLOUT_SPEED,
    LiveDisplay,
    PlainDisplay,
    Progress,
    make_display,
    render,
    sparkline,
    step_line,
)

METRICS = {
    REWARD: 0.5234,
    RESPONSE_LENGTH: 4.1,
    ROLLOUT_SPEED: 571.3,
    MISMATCH: 0.0,
    "timing_s/rollout": 1.2,
    "timing_s/reward": 0.01,
    "timing_s/train": 3.1,
    "timing_s/weight_sync": 0.3,
}


def console(width: int = 100, is_terminal: bool = True) -> Console:
    return Console(file=io.StringIO(), force_terminal=is_terminal, width=width)


def drawn(progress: Progress, now: float = 0.0, width: int = 100) -> str:
    recorder = Console(file=io.StringIO(), record=True, width=width)
    recorder.print(render(progress, now, None, width))
    return recorder.export_text()


def progress_after(num_steps: int, **changes: float) -> Progress:
    progress = Progress(
        title="tiny on sums", num_steps=60, started=0.0, first_step_started=10.0, output_dir="outputs/x"
    )
    progress.add(0, {EXPECTED_REWARD: 0.285})
    for step in range(1, num_steps + 1):
        progress.add(step, METRICS | changes)
    return progress


def test_a_step_is_one_line_with_every_figure():
    line = step_line(3, 60, METRICS | {EXPECTED_REWARD: 0.2851})
    assert line == (
        "step  3/60 | reward 0.523 | length 4.1 | 571 tokens/s | mismatch 0.0 | "
        "rollout 1.2s reward 0.0s train 3.1s sync 0.3s | expected reward 0.285"
    )


def test_a_line_leaves_out_what_was_not_measured():
    assert step_line(0, 60, {EXPECTED_REWARD: 0.285}) == "step  0/60 | expected reward 0.285"


def test_the_smallest_mismatch_does_not_read_zero():
    assert "mismatch 1.2e-07" in step_line(1, 2, {MISMATCH: 1.2e-7})
    assert "rollout and trainer differ" in drawn(progress_after(2, **{MISMATCH: 1.2e-7}))
    assert "1.2e-07" in drawn(progress_after(2, **{MISMATCH: 1.2e-7}))


def test_a_mismatch_stays_in_view_after_it_has_passed():
    progress = progress_after(1, **{MISMATCH: 0.5})
    progress.add(2, METRICS)
    assert "0.5" in drawn(progress)
    assert "!•" in drawn(progress)


def test_the_panel_shows_every_figure():
    text = drawn(progress_after(20), now=210.0)
    for part in ("step 20 of 60", "3:30, 6:40 to go", "0.523", "4.1", "571", "train 3.1", "tiny on sums", "outputs/x"):
        assert part in text, part


def test_a_run_that_has_ended_has_no_time_to_go():
    progress = progress_after(20)
    progress.phase = ""
    assert "3:30" in drawn(progress, now=210.0)
    assert "to go" not in drawn(progress, now=210.0)


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_panel_fits_the_terminal(width: int):
    progress = progress_after(37)
    progress.sample = ("12 + 25 = 37\n3 + 28 =", " 31\n" * 40, 1.0)
    lines = drawn(progress, width=width).splitlines()
    assert {len(line) for line in lines} == {min(width, 100)}
    assert sum("3 + 28 = 31⏎" in line for line in lines) == 1


def test_the_expected_reward_is_held_between_measurements():
    progress = progress_after(3)
    progress.add(4, METRICS | {EXPECTED_REWARD: 0.4})
    assert progress.history[EXPECTED_REWARD] == [0.285] * 4 + [0.4]
    assert "from 0.285" in drawn(progress)


def test_sparkline_scales_bins_and_clamps():
    assert sparkline([0.0, 0.5, 1.0], 10) == "▁▄▇"
    assert sparkline([0.5], 10, low=0.0, high=1.0) == "▄"
    assert sparkline([2.0, 2.0], 10) == "▁▁"
    assert sparkline([], 10) == ""
    assert len(sparkline(list(range(1000)), 32)) == 32
    assert sparkline([-1.0, 5.0], 10, low=0.0, high=1.0) == "▁▇"


def test_figures_that_are_no_numbers_are_not_drawn():
    progress = Progress(title="x", num_steps=2)
    progress.add(1, {REWARD: float("nan"), MISMATCH: float("inf"), "note": "text"})  # type: ignore[dict-item]
    assert progress.history == {}
    drawn(progress)


def test_a_terminal_gets_the_panel_and_a_pipe_gets_lines():
    progress = Progress(title="x", num_steps=2)
    assert isinstance(make_display(progress, "auto", console()), LiveDisplay)
    assert type(make_display(progress, "auto", console(is_terminal=False))) is PlainDisplay
    assert type(make_display(progress, "plain", console())) is PlainDisplay
    assert isinstance(make_display(progress, "live", console(is_terminal=False)), LiveDisplay)


def test_plain_lines_are_never_wrapped():
    out = console(width=20, is_terminal=False)
    with make_display(Progress(title="x", num_steps=60), "auto", out) as display:
        display.on_step(1, METRICS)
    assert out.file.getvalue().splitlines() == ["starting", step_line(1, 60, METRICS)]  # type: ignore[attr-defined]


def test_the_live_panel_redraws_and_leaves_its_last_state():
    out = console()
    with make_display(Progress(title="tiny on sums", num_steps=2), "live", out) as display:
        for step in (1, 2):
            display.on_step(step, METRICS)
        display.note("a line above the panel")
    text = out.file.getvalue()  # type: ignore[attr-defined]
    assert "a line above the panel" in text
    assert "step 2 of 2" in text.split("a line above the panel")[1]
