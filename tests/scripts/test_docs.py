"""The code in README and docs runs as printed, but for the model's name and the number of steps."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from engine.model_config import SUPPORTED_ARCHITECTURES

ROOT = Path(__file__).resolve().parents[2]


def python_block(page: str) -> str:
    """The page's one block of Python."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)
    assert len(blocks) == 1, f"{page} has {len(blocks)} blocks of Python"
    return blocks[0]


def run_code(code: str, directory: Path) -> str:
    script = directory / "example.py"
    script.write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, str(script)], cwd=directory, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_readme_example_runs(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    code = python_block("README.md").replace("smollm2-135m-instruct", str(tiny_model_dir("llama")))
    output = run_code(code, tmp_path)
    assert len(output.splitlines()) == 5  # four samples of the first prompt, then the sync
    assert output.splitlines()[-1].startswith("0 MB in ")


def test_custom_trainer_trains_in_lockstep(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    code = python_block("docs/custom_trainer.md")
    assert len([line for line in code.splitlines() if line.strip()]) < 40
    assert "assert torch.equal(output.logprobs, batch.rollout_logprobs)" in code
    code = code.replace("smollm2-135m-instruct", str(tiny_model_dir("llama"))).replace(", 20\n", ", 2\n", 1)
    output = run_code(code, tmp_path)
    assert [line.split(":")[0] for line in output.splitlines()] == ["step 0", "step 1"]


def test_the_table_of_models_names_every_architecture_and_only_tests_that_exist():
    page = (ROOT / "docs" / "models.md").read_text()
    assert set(re.findall(r"`(\w+ForCausalLM)` \(`(\w+)`\)", page)) == set(SUPPORTED_ARCHITECTURES.items())
    tests = re.findall(r"`(tests/\S+\.py)(?:::(\w+))?`", page)
    assert len(tests) > 5
    for path, name in tests:
        assert f"def {name}" in (ROOT / path).read_text()


def test_links_between_pages_lead_somewhere():
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\((?!https?://)([^)#]+)[^)]*\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
