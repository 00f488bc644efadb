from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from recipe_runs import ROOT, read_lines, start_run

from recipes.data import NUM_HELD_OUT_SUMS, sums_problems
from recipes.grpo_math import main
from recipes.options import parse_options
from recipes.rewards import exact_match, numeric
from recipes.run import load, make_config, make_engine_config, with_right_completions
from rollout.journal import read_journal
from rollout.replay import replay
from trainers import GRPOConfig
from trainers.gpu_shares import GPUShares


def test_the_first_line_says_what_happens_before_anything_heavy_is_imported(tmp_path: Path):
    start = time.monotonic()
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "recipes.grpo_math",
        "--dataset",
        str(tmp_path / "absent.jsonl"),
    ]
    result = subprocess.run(command, check=False, cwd=ROOT, text=True, capture_output=True)
    assert result.stdout.startswith("Lockstep: GRPO on ")
    assert "error: dataset" in result.stderr
    assert "no such file" in result.stderr
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert result.returncode == 2
    assert time.monotonic() - start < 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-steps", "-1"], "num_steps=-1"),
        (["--temperature", "0"], "temperature=0"),
        (["--num-threads", "0"], "num_threads=0"),
        (["--reward", "task_score"], "needs a task of reasoning_gym"),
        (["--num-held-out", "1000"], "num_held_out=1000"),
        (["--config", "absent.yaml"], "--config absent.yaml"),
        (["--engine-gpus", "1.5"], "engine_gpus=1.5 must be a part of a GPU"),
        pytest.param(
            ["--device", "cuda"],
            "device='cuda' is not available",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU"),
        ),
    ],
)
def test_a_mistake_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
):
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*arguments, "--output-dir", str(tmp_path / "run")]) == 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_dry_run_says_what_fits_and_leaves_nothing(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], capsys: pytest.CaptureFixture[str]
):
    run = ["--model", str(tiny_model_dir()), "--output-dir", str(tmp_path / "run"), "--num-engines", "2"]
    previous = signal.getsignal(signal.SIGTERM)
    try:
        assert main([*run, "--dry-run", "--group-size", "4", "--max-tokens", "32"]) == 0
        assert main([*run, "--dry-run", "--max-model-len", "10000"]) == 2
    finally:
        signal.signal(signal.SIGTERM, previous)
    printed, error = capsys.readouterr()
    assert printed.startswith("each of 2 engines:\nnumbers ")
    assert "samples of 512 + 32 tokens" in printed
    assert "groups of 4 " in printed
    assert "max_model_len=10000 exceeds" in error
    assert not (tmp_path / "run").exists()


def test_right_completions_are_those_that_exact_match_takes():
    options = parse_options([])
    rows = with_right_completions(sums_problems().held_out_rows, exact_match, options)
    assert len(rows) == NUM_HELD_OUT_SUMS
    for row in rows:
        number = row["answer"].strip()
        assert row["right_completions"] == [f" {number}\n", f"{number}\n"]
    assert with_right_completions(sums_problems().held_out_rows, numeric, options) == []


def test_no_right_completion_is_counted_twice():
    options = parse_options(["--stop", "\\n", "\\n\\n", "END"])
    row = with_right_completions([{"prompt": "2 + 2 =", "answer": "4"}], exact_match, options)[0]
    assert row["right_completions"] == ["4\n", "4END", " 4\n", " 4END"]


def test_without_a_stop_text_a_right_completion_ends_with_the_models_end_token(tiny_model_dir: Callable[..., Path]):
    options = parse_options(["--dataset", "my.jsonl", "--model", str(tiny_model_dir())])
    row = with_right_completions([{"prompt": "2 + 2 =", "answer": "4"}], exact_match, options)[0]
    assert row["right_completions"] == ["4<|im_end|>", " 4<|im_end|>"]


def test_options_reach_trainer_and_engine(tmp_path: Path):
    options = parse_options(["--num-threads", "1", "--seed", "3", "--clip-high", "0.28", "--max-num-seqs", "7"])
    grpo_config, engine_config = make_config(GRPOConfig, options, tmp_path), make_engine_config(options)
    assert (grpo_config.num_threads, grpo_config.seed, grpo_config.clip_high) == (1, 3, 0.28)
    assert (engine_config.num_threads, engine_config.seed, engine_config.max_num_seqs) == (1, 3, 7)
    assert grpo_config.stop == ("\n",)
    assert grpo_config.max_tokens == 5
    assert grpo_config.output_dir == str(tmp_path)
    assert make_config(GRPOConfig, parse_options(["--no-save-weights"]), tmp_path).output_dir is None


def test_one_gpu_holds_the_engine_and_the_trainer_of_its_config(tmp_path: Path):
    options = parse_options(["--config", str(ROOT / "recipes/configs/one_gpu.yaml"), "--device", "cpu"])
    config, engine_config = make_config(GRPOConfig, options, tmp_path), make_engine_config(options)
    shares = GPUShares.from_config(config, engine_config)
    assert 0 < shares.engine < shares.trainer
    shares.require_room(config.num_engines, 1.0)


def test_chat_asks_in_messages():
    prompt = load(parse_options(["--chat"])).train_rows[0]["prompt"]
    assert prompt[0]["role"] == "user"


def test_a_run_leaves_a_complete_directory_and_nothing_running(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str
):
    kept = ["--journal", "--keep-weights-every", "1"]
    run = start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "run", "--num-steps", "2", *kept)
    printed = run.wait()
    assert run.process.returncode == 0, printed
    assert run.processes_after(10) == []

    metrics = read_lines(run.output_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert 0.0 < metrics[0]["eval/expected_reward"] < 1.0
    assert "eval/expected_reward" in metrics[2]
    for line in metrics[1:]:
        assert line["mismatch/logprob_abs_diff_max"] == 0.0
        assert line["mismatch/num_tokens"] == 4 * 8
        assert 0.0 < line["reward/mean"] < 1.0
        assert line["actor/grad_norm"] > 0
        assert line["response_length/mean"] == 1
        for phase in ("rollout", "reward", "train", "weight_sync", "step"):
            assert line[f"timing_s/{phase}"] > 0

    config = yaml.safe_load((run.output_dir / "config.yaml").read_text())
    assert (config["num_steps"], config["num_prompts"], config["stop"]) == (2, 4, [])
    environment = json.loads((run.output_dir / "environment.json").read_text())
    assert environment["trainer"]["kernel_fingerprint"]
    assert environment["trainer"]["num_threads"] >= 1
    rollouts = read_lines(run.output_dir / "rollouts.jsonl")
    assert len(rollouts) == 2 * 2 * 8
    assert all(len(line["token_ids"]) == len(line["logprobs"]) == len(line["policy_versions"]) for line in rollouts)
    assert (run.output_dir / "reward_curve.png").read_bytes().startswith(b"\x89PNG")
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
        path.name for path in (run.output_dir / "weights").iterdir()
    }

    assert "step 1/2 | reward " in printed
    assert "mismatch 0.0" in printed
    before, after = (metrics[index]["eval/expected_reward"] for index in (0, 2))
    assert f"expected reward {before:.3f} -> {after:.3f}" in printed

    report = replay(read_journal(run.output_dir))
    assert not report.differences
    assert report.num_equal == 2 * 4 * 8


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_signal_ends_a_run_cleanly(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str, signum: int, code: int
):
    run = start_run("grpo_math", tiny_model_dir(), likely_data, tmp_path / "run", "--num-steps", "100000")
    run.wait_for("step      2/")
    assert run.processes()
    run.process.send_signal(signum)
    printed = run.wait()
    assert run.process.returncode == code, printed
    assert "Traceback" not in printed
    assert run.processes_after(10) == []
    metrics = read_lines(run.output_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics[:3]] == [0, 1, 2]
    assert read_lines(run.output_dir / "rollouts.jsonl")[-1]["step"] == metrics[-1]["step"]
    assert (run.output_dir / "reward_curve.png").exists()
