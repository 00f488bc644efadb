from __future__ import annotations

import json
import math
import subprocess
import time
from pathlib import Path

import pytest

from recipes.run_directory import (
    RunDirectory,
    default_path,
    ended_before_its_first_checkpoint,
    environment,
    git_commit,
    running_mean,
)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_are_on_disk_as_soon_as_they_are_logged(tmp_path: Path):
    run = RunDirectory(tmp_path / "run")
    run.log_metrics({"step": 0, "eval/expected_reward": 0.285})
    run.log_metrics({"step": 1, "reward/mean": math.nan, "mismatch/logprob_abs_diff_max": 0.0})
    assert read_lines(tmp_path / "run" / "metrics.jsonl") == [
        {"step": 0, "eval/expected_reward": 0.285},
        {"step": 1, "reward/mean": None, "mismatch/logprob_abs_diff_max": 0.0},
    ]
    run.close()


def test_rollouts_are_readable_lines(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.log_rollouts([{"prompt": "3 + 4 =", "completion": " 7 ✓"}])
    run.close()
    assert (tmp_path / "rollouts.jsonl").read_text() == '{"prompt": "3 + 4 =", "completion": " 7 ✓"}\n'


def test_half_a_surrogate_pair_is_written_and_read_back(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.log_rollouts([{"answer": "\ud83d", "completion": "🎉"}])
    run.close()
    assert read_lines(tmp_path / "rollouts.jsonl") == [{"answer": "\ud83d", "completion": "🎉"}]


def test_a_run_is_not_overwritten_unless_asked(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.log_metrics({"step": 0})
    run.close()
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "report.html").write_text("old")
    for name in ("weights", "trackers"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="holds a run already; name another --output-dir, or pass --overwrite"):
        RunDirectory(tmp_path)
    RunDirectory(tmp_path, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def write_lines(path: Path, steps: list[int]) -> None:
    path.write_text("".join(json.dumps({"step": step, "reward/mean": step / 10}) + "\n" for step in steps))


def test_a_run_goes_on_after_a_step_and_what_was_written_beyond_is_cut_off(tmp_path: Path):
    write_lines(tmp_path / "metrics.jsonl", [0, 1, 2, 3, 4])
    write_lines(tmp_path / "rollouts.jsonl", [1, 1, 2, 2, 3, 3, 4])
    with (tmp_path / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 4, "completion": "cut of')
    run = RunDirectory(tmp_path, after_step=2)
    assert run.num_cut_lines == 2 + 4
    assert [line["step"] for line in run.resumed] == [0, 1, 2]
    assert not run.has_metrics  # of this process
    run.log_metrics({"step": 3, "reward/mean": 0.5})
    assert run.has_metrics
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2, 3]
    assert [line["step"] for line in read_lines(tmp_path / "rollouts.jsonl")] == [1, 1, 2, 2]


def test_a_torn_line_is_cut_off_even_if_it_is_the_last_to_keep(tmp_path: Path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n{"step": 1}')
    assert RunDirectory(tmp_path, after_step=5).num_cut_lines == 1
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 0}\n'
    assert RunDirectory(tmp_path / "new", after_step=5).resumed == []


@pytest.mark.parametrize(
    ("num_lines", "config", "expected"),
    [
        (3, "checkpoint_every: 2\n", True), (0, "checkpoint_every: 2\n", True), (4, "checkpoint_every: 2\n", False),
        (1, "checkpoint_every: 0\n", False), (1, "num_steps: 3\n", False), (1, "[", False), (1, None, False),
    ],
)  # fmt: skip
def test_only_a_run_that_was_to_make_checkpoints_and_made_none_counts_as_ended_early(
    tmp_path: Path, num_lines: int, config: str | None, expected: bool
):
    write_lines(tmp_path / "metrics.jsonl", list(range(num_lines)))
    if config is not None:
        (tmp_path / "config.yaml").write_text(config)
    assert ended_before_its_first_checkpoint(tmp_path) is expected
    assert not ended_before_its_first_checkpoint(tmp_path / "absent")


def test_a_file_is_no_output_directory(tmp_path: Path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file"):
        RunDirectory(tmp_path / "file")


def test_the_environment_names_versions_threads_and_commit(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.write_environment({"trainer": {"kernel_fingerprint": "abc", "num_threads": 2}})
    facts = json.loads((tmp_path / "environment.json").read_text())
    assert facts["trainer"] == {"kernel_fingerprint": "abc", "num_threads": 2}
    assert {"torch", "ray", "transformers"} <= facts["versions"].keys()
    assert facts["num_available_cores"] >= 1
    assert environment().keys() <= facts.keys()


def test_the_commit_says_whether_files_differ_from_it(tmp_path: Path):
    assert git_commit(tmp_path) is None

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
        result = subprocess.run(
            ["git", *identity, *arguments], cwd=tmp_path, check=True, capture_output=True, text=True
        )
        return result.stdout.strip()

    git("init", "-q")
    (tmp_path / "file").write_text("one")
    git("add", "file")
    git("commit", "-q", "-m", "one")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD")
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == git("rev-parse", "HEAD") + "+changes"


def test_the_reward_curve_is_a_picture(tmp_path: Path):
    run = RunDirectory(tmp_path)
    run.draw_reward_curve("nothing yet")
    assert not (tmp_path / "reward_curve.png").exists()
    run.log_metrics({"step": 0, "eval/expected_reward": 0.3})
    for step in range(1, 4):
        run.log_metrics({"step": step, "reward/mean": step / 10})
    run.log_metrics({"step": 4})  # every sample masked: no mean
    run.draw_reward_curve("tiny on sums")
    assert (tmp_path / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "reward_curve.png"]


def test_running_mean_starts_at_the_first_value():
    assert running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert running_mean([1.0, 0.0])[0] == 1.0
    assert 0.0 < running_mean([1.0, 0.0])[1] < 0.5


def test_every_run_gets_a_directory_named_by_data_and_time():
    now = time.struct_time((2025, 1, 31, 14, 5, 9, 4, 31, 0))
    assert default_path("openai/gsm8k", now) == Path("outputs/grpo-gsm8k-20250131-140509")
    assert default_path("/data/my sums.jsonl", now) == Path("outputs/grpo-my-sums.jsonl-20250131-140509")
