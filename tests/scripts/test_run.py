"""scripts/run: sets up when it must, and otherwise hands the command over untouched."""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Stands in for the set-up, which takes minutes: notes that it was called and leaves what scripts/run looks for.
STAND_IN = """
import sys
from pathlib import Path
venv = Path(__file__).resolve().parent.parent / ".venv"
(venv / "bin").mkdir(parents=True, exist_ok=True)
if not (venv / "bin" / "python").exists():
    (venv / "bin" / "python").symlink_to(sys.executable)
(venv / "stamp").write_text(sys.argv[1] + "\\n")
print("set-up was here")
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    root = tmp_path / "a checkout"
    (root / "scripts").mkdir(parents=True)
    for name in ("scripts/run", "scripts/constraints.txt", "pyproject.toml"):
        shutil.copy(ROOT / name, root / name)
    (root / "scripts" / "set_up.py").write_text(STAND_IN)
    return root


def run(checkout: Path, *command: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(checkout / "scripts" / "run"), *command],
        input=stdin,
        env={"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", **environment},
        cwd=checkout.parent,
        capture_output=True,
        text=True,
        check=False,
    )


def test_command_gets_its_arguments_and_stdin_and_gives_its_output_and_exit_code(checkout: Path):
    code = "import sys; print(sys.argv[1:], sys.stdin.read()); sys.exit(7)"
    for _ in range(2):  # with set-up and without
        result = run(checkout, "python", "-c", code, "a b", "", "*", stdin="typed")
        assert (result.stdout, result.returncode) == ("['a b', '', '*'] typed\n", 7)


def test_set_up_runs_once_and_again_when_the_pins_change(checkout: Path):
    assert "set-up was here" in run(checkout, "true").stderr
    assert run(checkout, "true").stderr == ""
    with (checkout / "scripts" / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert "set-up was here" in run(checkout, "true").stderr


def test_set_up_runs_again_in_a_moved_checkout(checkout: Path):
    run(checkout, "true")
    assert "set-up was here" in run(checkout.rename(checkout.parent / "moved"), "true").stderr


def test_command_runs_in_the_environment_with_the_checkout_on_its_path(checkout: Path):
    (checkout / "a_module.py").write_text("")
    code = "import a_module, os; print(os.environ['VIRTUAL_ENV'])"
    assert run(checkout, "python", "-c", code).stdout == f"{checkout / '.venv'}\n"


def test_later_calls_start_at_once(checkout: Path):
    run(checkout, "true")
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        run(checkout, "true")
        seconds.append(time.perf_counter() - start)
    assert min(seconds) < 0.05


def test_without_a_command_it_says_how_to_use_it(checkout: Path):
    result = run(checkout)
    assert result.returncode == 2
    assert "usage: scripts/run COMMAND" in result.stderr


def test_a_python_that_is_too_old_or_missing_is_refused_with_the_way_out(checkout: Path):
    result = run(checkout, "true", LOCKSTEP_PYTHON="/no/such/python")
    assert result.returncode == 1
    assert "/no/such/python" in result.stderr
    assert "install Python 3.11 to 3.14" in result.stderr


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_clean_checkout_sets_itself_up(tmp_path: Path):
    root = tmp_path / "clean"
    shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns(".venv", ".git", "outputs", "__pycache__"))
    code = "import torch, ray, transformers, engine, kernels; kernels.self_test(); print(engine.__file__)"
    result = subprocess.run(
        [str(root / "scripts" / "run"), "python", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == f"{root / 'engine' / '__init__.py'}\n"
    assert len(result.stderr.splitlines()) == 2, result.stderr  # what it does, and that it is done
