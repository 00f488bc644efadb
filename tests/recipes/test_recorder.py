from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from rich.console import Console

from recipes.display import EXPECTED_REWARD, MISMATCH, PlainDisplay, Progress
from recipes.recorder import NUM_MISMATCH_TOKENS, Recorder
from recipes.report import from_files
from recipes.run_directory import RunDirectory
from rollout import Rollout, SamplingParams
from trainers.loop import Batch
from trainers.rewards import Rewards

ENVIRONMENT = {"trainer": {"kernel_fingerprint": "abc"}}


def rollout(group: int, index: int, text: str) -> Rollout:
    return Rollout(
        group_id=f"g{group}",
        index=index,
        prompt_token_ids=[1, 2],
        token_ids=[3, 4],
        logprobs=[-0.5, -0.25],
        policy_versions=[0, 0],
        finish_reason="stop",
        stop_reason="\n",
        text=text,
        loss_mask=[1, 1],
        seed=7,
        sampling_params=SamplingParams(),
        is_exact=True,
        kernel_fingerprint="abc",
        metadata={},
    )


def batch() -> Batch:
    rewards = torch.tensor([[1.0, float("nan")], [0.0, 1.0]])
    return Batch(
        rows=[{"prompt": "3 + 4 =", "answer": " 7"}, {"prompt": [{"role": "user", "content": "hi"}], "answer": "ho"}],
        groups=[[rollout(0, 0, " 7"), rollout(0, 1, " 8")], [rollout(1, 0, "hm"), rollout(1, 1, "ho")]],
        rewards=Rewards(total=rewards, by_function={"exact_match": rewards}, num_failed=1),
        advantages=torch.tensor([[0.0, 0.0], [-0.5, 0.5]]),
    )


def recorder(path: Path, num_logged_groups: int = 2, num_steps: int = 2) -> Recorder:
    progress = Progress(title="tiny on sums", num_steps=num_steps, output_dir=str(path))
    display = PlainDisplay(progress, Console(file=io.StringIO()))
    return Recorder(RunDirectory(path), display, num_logged_groups)


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_steps_are_written_shown_and_summed_up(tmp_path: Path):
    kept = recorder(tmp_path)
    kept.record({"step": 0, EXPECTED_REWARD: 0.2849}, None, ENVIRONMENT)
    kept.record({"step": 1, MISMATCH: 0.0, NUM_MISMATCH_TOKENS: 1200}, batch(), ENVIRONMENT)
    kept.record({"step": 2, EXPECTED_REWARD: 0.7, MISMATCH: 0.0, NUM_MISMATCH_TOKENS: 34}, batch(), ENVIRONMENT)
    kept.finish()
    assert [line["step"] for line in read_lines(tmp_path / "metrics.jsonl")] == [0, 1, 2]
    assert json.loads((tmp_path / "environment.json").read_text())["trainer"] == ENVIRONMENT["trainer"]
    assert (tmp_path / "reward_curve.png").exists()
    assert kept.display.console.file.getvalue().count("step ") == 3  # type: ignore[attr-defined]
    assert kept.summary() == [
        "expected reward 0.285 -> 0.700",
        "largest difference of log-probabilities 0.0, over 1,234 tokens",
        f"files in {tmp_path}; report.html there shows curves and rollouts",
    ]


def test_rollouts_are_kept_in_readable_form_with_their_bits(tmp_path: Path):
    kept = recorder(tmp_path, num_logged_groups=1)
    kept.record({"step": 1}, batch(), ENVIRONMENT)
    lines = read_lines(tmp_path / "rollouts.jsonl")
    assert [(line["completion"], line["reward"]) for line in lines] == [(" 7", 1.0), (" 8", None)]
    assert list(lines[0])[:5] == ["step", "prompt", "completion", "answer", "reward"]
    assert lines[0]["logprobs"] == [-0.5, -0.25]
    assert lines[0]["policy_versions"] == [0, 0]
    assert kept.progress.sample == ("3 + 4 =", " 7", 1.0)


def test_the_report_grows_with_the_run_and_equals_one_made_of_its_files(tmp_path: Path):
    kept = recorder(tmp_path)
    kept.record({"step": 0, EXPECTED_REWARD: 0.25}, None, ENVIRONMENT)
    assert '"eval/expected_reward"' in (tmp_path / "report.html").read_text()
    kept.record({"step": 1, EXPECTED_REWARD: 0.75}, batch(), ENVIRONMENT)
    kept.finish()
    live = (tmp_path / "report.html").read_bytes()
    assert b"0.250 \xe2\x86\x92 0.750" in live
    assert from_files(tmp_path).read_bytes() == live


def test_the_texts_of_tokens_are_kept_with_the_rollouts(tmp_path: Path):
    kept = recorder(tmp_path)
    kept.token_texts = lambda token_ids: [f"<{token_id}>" for token_id in token_ids]
    kept.record({"step": 1}, batch(), ENVIRONMENT)
    assert read_lines(tmp_path / "rollouts.jsonl")[0]["token_texts"] == ["<3>", "<4>"]


def test_a_tracker_is_told_of_every_step_and_of_the_end(tmp_path: Path):
    told = []
    kept = recorder(tmp_path)
    kept.tracker = SimpleNamespace(log=told.append, finish=lambda: told.append("end"))  # type: ignore[assignment]
    kept.record({"step": 0}, None, ENVIRONMENT)
    kept.record({"step": 1}, batch(), ENVIRONMENT)
    kept.finish()
    assert told == [{"step": 0}, {"step": 1}, "end"]


def test_no_rollouts_are_kept_where_none_are_wanted(tmp_path: Path):
    kept = recorder(tmp_path, num_logged_groups=0)
    kept.record({"step": 1}, batch(), ENVIRONMENT)
    assert not (tmp_path / "rollouts.jsonl").exists() or not (tmp_path / "rollouts.jsonl").read_text()
    assert kept.progress.sample is not None


def test_a_run_that_goes_on_is_shown_and_summed_up_as_a_whole(tmp_path: Path):
    first = recorder(tmp_path)
    first.record({"step": 0, EXPECTED_REWARD: 0.25}, None, ENVIRONMENT)
    first.record({"step": 1, MISMATCH: 0.0, NUM_MISMATCH_TOKENS: 100}, batch(), ENVIRONMENT)
    progress = Progress(title="tiny on sums", num_steps=3, output_dir=str(tmp_path))
    display = PlainDisplay(progress, Console(file=io.StringIO()))
    second = Recorder(RunDirectory(tmp_path, after_step=1), display, 1)
    assert progress.step == 1
    second.record({"step": 2, EXPECTED_REWARD: 0.5, MISMATCH: 0.0, NUM_MISMATCH_TOKENS: 10}, batch(), ENVIRONMENT)
    assert second.summary()[:2] == [
        "expected reward 0.250 -> 0.500",
        "largest difference of log-probabilities 0.0, over 110 tokens",
    ]
    assert json.loads((tmp_path / "environment.json").read_text())["trainer"] == ENVIRONMENT["trainer"]
    assert progress.seconds_left(progress.first_step_started + 8.0) is None  # no step since has been timed
    second.record({"step": 3}, batch(), ENVIRONMENT)
    assert progress.seconds_left(progress.first_step_started + 8.0) == 0.0
