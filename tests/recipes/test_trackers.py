from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest

from recipes.options import GRPOOptions, parse_options
from recipes.trackers import PACKAGES, Tracker, require_package

OPTIONS = GRPOOptions().flat()


def logged(name: str, path: Path) -> None:
    tracker = Tracker(name, path, OPTIONS)  # type: ignore[arg-type]
    tracker.log({"step": 0, "eval/expected_reward": 0.25})
    tracker.log({"step": 1, "reward/mean": 0.5, "mismatch/kl": math.nan})
    tracker.log({"step": 2, "reward/mean": 0.75})
    tracker.finish()


def test_tensorboard_reads_back_what_was_logged(tmp_path: Path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    logged("tensorboard", tmp_path)
    (file,) = (tmp_path / "trackers").glob("*/events.out.tfevents.*")
    events = EventAccumulator(str(file))
    events.Reload()
    scalars = {name: [(event.step, event.value) for event in events.Scalars(name)] for name in events.Tags()["scalars"]}
    assert scalars == {"eval/expected_reward": [(0, 0.25)], "reward/mean": [(1, 0.5), (2, 0.75)]}


def test_wandb_keeps_a_run_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logged("wandb", tmp_path)
    assert list((tmp_path / "trackers").glob("wandb/offline-run-*/*.wandb"))


def test_no_tracker_writes_nothing(tmp_path: Path):
    logged("none", tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", PACKAGES)
def test_a_tracker_without_its_package_says_how_to_get_it(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"tracker='{name}' needs the package '{name}'.*pip install {name}"):
        require_package(name)  # type: ignore[arg-type]


def test_the_tracker_is_an_option():
    assert GRPOOptions().output.tracker == "none"
    assert parse_options(["--tracker", "tensorboard"]).output.tracker == "tensorboard"
