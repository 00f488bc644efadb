from __future__ import annotations

import os
import random
import re
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from recipe_runs import Run, read_lines, start_run

from recipes.grpo_math import main
from recipes.options import parse_options
from recipes.resuming import settings_of_data
from recipes.rewards import exact_match
from recipes.run import load, make_config
from recipes.run_directory import RunDirectory
from rollout.journal import read_journal
from rollout.replay import replay
from trainers import GRPOConfig
from trainers.run_checkpoints import RunCheckpoints

LEARNING = ["--learning-rate", "1e-3", "--warmup-steps", "2", "--num-iterations", "2", "--micro-batch-tokens", "64"]
SETTINGS = [*LEARNING, "--eval-every", "3", "--seed", "5", "--kl-coef", "0.05", "--num-threads", "1"]
DIED = -signal.SIGKILL


def figures(path: Path) -> list[dict]:
    """metrics.jsonl without what depends on the clock."""
    timing = ("timing_s/", "perf/", "weight_sync/pause_seconds")
    lines = read_lines(path / "metrics.jsonl")
    return [{name: value for name, value in line.items() if not name.startswith(timing)} for line in lines]


def assert_same_run(path: Path, expected: Path, num_steps: int) -> None:
    assert [line["step"] for line in figures(path)] == list(range(num_steps + 1))
    assert figures(path) == figures(expected)
    assert len({line.get("actor/pg_loss") for line in figures(path)}) > 2, "nothing was learned that could differ"
    last = f"checkpoints/step-{num_steps:06d}"
    files = ("rollouts.jsonl", "weights/model.safetensors", f"{last}/model/model.safetensors")
    for name in (*files, f"{last}/optimizer.safetensors"):
        assert (path / name).read_bytes() == (expected / name).read_bytes(), name


def kill_after(run: Run, step: int, seconds: float, num_steps: int) -> int:
    run.wait_for(f"step {step:>{len(str(num_steps))}}/")
    time.sleep(seconds)
    return run.kill()


def checkpoints(run: Run) -> set[Path]:
    """Complete ones, and those that are being written."""
    return set(run.output_dir.glob("checkpoints/*step-*"))


def kill_in_a_checkpoint(run: Run, seconds: float) -> int:
    """Kills while a checkpoint is written, or soon after it if the machine is faster than this loop."""
    before = checkpoints(run)  # what the kill before this one left half written among them
    while not checkpoints(run) - before:
        assert run.process.poll() is None, "the run ended without another checkpoint"
        time.sleep(0.001)
    time.sleep(seconds)
    return run.kill()


@pytest.fixture
def chance(request: pytest.FixtureRequest) -> random.Random:
    seed = int.from_bytes(os.urandom(4), "little")
    print(f"kills are drawn with seed {seed}")  # shown if the test fails
    return random.Random(seed)


@pytest.mark.slow  # four starts of Ray; by default tests/trainers/test_grpo.py goes on from a checkpoint
@pytest.mark.timeout(900)
def test_a_run_killed_at_a_random_step_and_in_a_checkpoint_goes_on_as_if_nothing_had_been(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str, chance: random.Random
):
    num_steps = 6
    arguments = [*SETTINGS, "--num-steps", str(num_steps), "--checkpoint-every", "2"]
    undisturbed = start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "expected", *arguments)
    printed = undisturbed.wait()
    assert undisturbed.process.returncode == 0, printed

    def resume() -> Run:
        return start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "run", *arguments, "--resume", "auto")

    assert kill_after(resume(), chance.randrange(num_steps), chance.random() / 2, num_steps) == DIED
    assert kill_in_a_checkpoint(resume(), chance.random() / 20) == DIED
    run = resume()
    printed = run.wait()
    assert run.process.returncode == 0, printed
    assert_same_run(tmp_path / "run", tmp_path / "expected", num_steps)
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == ["step-000004", "step-000006"]
    assert "resume" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


@pytest.fixture
def ended_run(tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str) -> list[str]:
    """The arguments of a run that left a checkpoint of step 2 and lines up to step 4."""
    arguments = ["--model", str(tiny_model_dir()), "--dataset", likely_data, "--output-dir", str(tmp_path / "run")]
    arguments += ["--reward", "exact_match", "--num-steps", "6", "--checkpoint-every", "2", "--max-tokens", "1"]
    options = parse_options(arguments)
    run = RunDirectory(tmp_path / "run")
    run.write_config(options.flat())
    for step in range(5):
        run.log_metrics({"step": step})
    run.close()
    config = make_config(GRPOConfig, options, tmp_path / "run")
    checkpoints = RunCheckpoints(config, load(options).train_rows, settings_of_data(options, exact_match))
    checkpoints.save(step=2, prompt_position=32, parts={"policy": write_nothing_of_use})
    return arguments


def write_nothing_of_use(directory: str) -> dict[str, int]:
    (Path(directory) / "model").mkdir()
    return {"policy_version": 2}


@pytest.mark.parametrize(
    ("others", "message"),
    [
        (
            ["--resume", "auto", "--clip-low", "0.3", "--reward", "numeric"],
            r"clip_low=0.2 \(now 0.3\), reward='exact_match' \(now 'numeric'\): a run goes on with the settings",
        ),
        (["--resume", "absent"], r"resume='absent' is no directory"),
        ([], r"holds a run already; name another --output-dir, or pass --overwrite, or --resume auto"),
    ],
)
def test_a_resume_that_cannot_be_is_refused_in_one_line_and_nothing_is_cut(
    tmp_path: Path, ended_run: list[str], capsys: pytest.CaptureFixture[str], others: list[str], message: str
):
    assert run_main([*ended_run, *others]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"error: .*{message}.*\n", error), error
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5


def test_where_no_checkpoint_is_whole_the_run_ends_with_the_reasons(
    tmp_path: Path, ended_run: list[str], capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "run" / "checkpoints" / "step-000002" / "state.json").write_text("{")
    assert run_main([*ended_run, "--resume", "auto"]) == 2
    assert "is whole (step-000002: state.json has 1 bytes instead of" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5


def test_a_run_without_checkpoints_is_not_begun_again_over_its_files(
    tmp_path: Path, ended_run: list[str], capsys: pytest.CaptureFixture[str]
):
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert run_main([*ended_run, "--resume", "auto"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert len(read_lines(tmp_path / "run" / "metrics.jsonl")) == 5


def run_main(arguments: list[str]) -> int:
    previous = signal.getsignal(signal.SIGTERM)
    try:
        return main(arguments)
    finally:
        signal.signal(signal.SIGTERM, previous)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("mode", ["lagged", "async"])
def test_a_run_whose_engines_draw_ahead_loses_nothing_that_was_drawn(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str, chance: random.Random, mode: str
):
    """Drawn one batch ahead, it goes on to the bit; drawn all the time, no group is lost or comes twice."""
    num_steps = 6
    arguments = [*SETTINGS, "--num-steps", str(num_steps), "--checkpoint-every", "1", "--mode", mode]
    arguments += ["--num-logged-groups", "4", "--max-staleness", "2"]

    def run_to(directory: Path, *others: str) -> Run:
        return start_run("grpo_math", tiny_model_dir(), likely_data, directory, *arguments, *others)

    assert kill_after(run_to(tmp_path / "run"), chance.randrange(1, num_steps), chance.random() / 2, num_steps) == DIED
    run = run_to(tmp_path / "run", "--resume", "auto")
    printed = run.wait()
    assert run.process.returncode == 0, printed
    lines = figures(tmp_path / "run")
    assert [line["step"] for line in lines] == list(range(num_steps + 1))
    assert all(line["mismatch/logprob_abs_diff_max"] == 0.0 for line in lines[1:] if line["mismatch/num_tokens"])
    assert all(line["staleness/max"] <= 2 for line in lines[1:])
    samples = [(line["group_id"], line["index"]) for line in read_lines(tmp_path / "run" / "rollouts.jsonl")]
    assert len(samples) == len(set(samples)) == num_steps * 4 * 8
    if mode == "lagged":
        assert {group_id for group_id, _ in samples} == {f"step{s}-prompt{p}" for s in range(1, 7) for p in range(4)}
        expected = run_to(tmp_path / "expected")
        printed = expected.wait()
        assert expected.process.returncode == 0, printed
        assert_same_run(tmp_path / "run", tmp_path / "expected", num_steps)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_run_killed_over_and_over_goes_on_to_the_same_end(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str, chance: random.Random
):
    num_steps = 30
    arguments = [*SETTINGS, "--num-steps", str(num_steps), "--learning-rate-schedule", "cosine", "--journal"]
    arguments += ["--checkpoint-every", "3", "--keep-weights-every", "1"]
    assert start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "expected", *arguments).wait()

    def resume() -> Run:
        engines = str(chance.choice((1, 2)))
        others = ["--resume", "auto", "--num-engines", engines]
        return start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "run", *arguments, *others)

    for number in range(8):
        run = resume()
        if number % 2:
            kill_in_a_checkpoint(run, chance.random() / 20)
        else:
            for _ in range(chance.randint(1, 3)):
                run.wait_for(f"/{num_steps} |")
            time.sleep(chance.random() / 5)
            run.kill()
    run = resume()
    printed = run.wait()
    assert run.process.returncode == 0, printed
    assert_same_run(tmp_path / "run", tmp_path / "expected", num_steps)
    report = replay(read_journal(run.output_dir))
    assert not report.differences
    assert not report.not_replayable


FULL_DISK = """
    mount -t tmpfs -o size=2m tmpfs "$0" || exit 77
    "$@"; echo "ended with $?"; ls "$0/run/checkpoints"
    mount -o remount,size=20m "$0"
    "$@" --resume auto; echo "ended with $?"; ls "$0/run/checkpoints"
    cat "$0/run/metrics.jsonl" > "$0.metrics"
"""


@pytest.mark.slow
def test_a_full_disk_ends_a_run_with_a_clear_error_and_more_room_lets_it_go_on(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str
):
    disk = tmp_path / "disk"  # a checkpoint takes 1.2 MB of it
    disk.mkdir()
    run = start_run(
        "grpo_math", tiny_model_dir(), likely_data, disk / "run",
        *SETTINGS, "--num-steps", "3", "--checkpoint-every", "1",
        within=["unshare", "-rm", "sh", "-c", FULL_DISK, str(disk)],
    )  # fmt: skip
    printed = run.wait()
    if run.process.returncode:
        pytest.skip("no tmpfs may be mounted here")
    assert "Traceback" not in printed
    full, more_room = printed.split("ended with 2\nstep-000001\n")
    assert "error: the checkpoint of step 2 cannot be written" in full
    assert "Make room there, keep fewer (keep_checkpoints=2)" in full
    assert "going on from " in more_room
    assert "step-000001, after step 1; 17 lines of later steps were cut off" in more_room
    assert more_room.endswith("ended with 0\nstep-000002\nstep-000003\n")
    assert [line["step"] for line in read_lines(tmp_path / "disk.metrics")] == [0, 1, 2, 3]
