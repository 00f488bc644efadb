"""The parts of scripts.gpu_check that need no device."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from engine import SamplingParams
from scripts.gpu_check.card import Card, card_of
from scripts.gpu_check.gpu_tests import split
from scripts.gpu_check.random_models import MODELS, TINY, random_weights
from scripts.gpu_check.report import Report, table, time_limit
from scripts.gpu_check.trainer_check import trainer_rounds

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_device_it_says_so_and_measures_nothing(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "scripts.gpu_check", "--output", str(tmp_path / "out.json")]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "finds no CUDA device" in result.stderr
    assert not (tmp_path / "out.json").exists()


def test_a_section_that_fails_is_noted_and_the_next_one_runs(tmp_path):
    report = Report(output=tmp_path / "out.json", limit_seconds=60, facts={"card": "X"})

    def broken(rows):
        rows.append({"what": "first", "passed": True})
        raise RuntimeError("no such kernel")

    report.run("broken", 10, broken)
    report.run("whole", 10, lambda rows: rows.append({"what": "second", "passed": True}))
    content = json.loads((tmp_path / "out.json").read_text())
    assert content["card"] == "X"
    assert content["sections"]["broken"]["rows"] == [{"what": "first", "passed": True}]
    assert "no such kernel" in content["sections"]["broken"]["error"]
    assert content["sections"]["whole"]["error"] is None
    assert report.has_failed


def test_a_check_that_did_not_pass_fails_the_report(tmp_path):
    report = Report(output=tmp_path / "out.json", limit_seconds=60)
    report.run("checks", 10, lambda rows: rows.append({"what": "a", "passed": True}))
    assert not report.has_failed
    report.run("more", 10, lambda rows: rows.append({"what": "b", "passed": False}))
    assert report.has_failed


def test_a_section_ends_with_its_budget_and_none_starts_without_time(tmp_path):
    report = Report(output=tmp_path / "out.json", limit_seconds=1.3)
    report.run("endless", 60, lambda rows: time.sleep(30))
    assert "TimeoutError" in report.sections["endless"]["error"]
    report.run("late", 60, lambda rows: rows.append({}))
    assert report.sections["late"]["rows"] == []
    assert "no time was left" in report.sections["late"]["error"]


def test_a_time_limit_leaves_no_alarm_behind():
    with time_limit(60):
        assert signal.getitimer(signal.ITIMER_REAL)[0] > 0
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_tables_have_a_column_for_every_key():
    text = table([{"what": "a", "ms": 1.23456}, {"what": "bb", "passed": False}])
    assert [line.split() for line in text.splitlines()] == [["what", "ms", "passed"], ["a", "1.235"], ["bb", "False"]]


def test_cards_are_known_by_name_and_others_by_what_they_did():
    assert card_of("NVIDIA H100 80GB HBM3", 1.0).bandwidth == 3.35e12
    assert card_of("NVIDIA H100 PCIe", 1.0).bandwidth == 2.0e12
    assert card_of("NVIDIA H200", 1.0).bandwidth == 4.8e12
    assert card_of("Some other", 7e11).bandwidth == 7e11
    card = Card(name="c", bandwidth=1e12, flops=1e14)
    assert card.floor_seconds(2e12) == 2.0
    assert card.floor_seconds(1e12, 5e14) == 5.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="is for machines without a GPU: there is no interpreter")
def test_a_round_of_training_passes_by_the_interpreter():
    model, params = {**TINY, "num_hidden_layers": 1}, SamplingParams(n=2, max_tokens=2, ignore_eos=True)
    (row,) = trainer_rounds(model, "float32", "interpreter", (5,), params, 1)
    assert row["passed"], row
    assert (row["tokens"], row["mismatch"]) == (4, 0.0)


def test_tests_are_dealt_out_whole():
    tests = [str(i) for i in range(10)]
    parts = split(tests, 4)
    assert sorted(test for part in parts for test in part) == tests
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert split(tests[:2], 4) == [["0"], ["1"]]


def test_random_weights_repeat_and_have_their_shapes():
    shapes = {"model.norm.weight": (64,), "model.layers.0.mlp.up_proj.weight": (32, 64)}
    first, second = (dict(random_weights(shapes, "cpu", seed=1)) for _ in range(2))
    assert {name: tuple(tensor.shape) for name, tensor in first.items()} == shapes
    assert all(torch.equal(first[name], second[name]) for name in shapes)
    other = dict(random_weights(shapes, "cpu", seed=2))
    assert not torch.equal(first["model.norm.weight"], other["model.norm.weight"])


def test_the_models_are_those_that_they_are_called():
    from engine.memory import weight_bytes
    from engine.model_config import ModelConfig

    sizes = {name: weight_bytes(ModelConfig.from_dict(config), torch.bfloat16) / 2e9 for name, config in MODELS.items()}
    assert sizes == pytest.approx({"qwen3-0.6b": 0.596, "qwen3-1.7b": 1.72}, rel=0.01)
