"""The code in README and docs runs as printed, but for the model's name and the number of steps."""

from __future__ import annotations

import contextlib
import io
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.model_config import SUPPORTED_ARCHITECTURES
from rollout import Observation, Turn

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "docs" / "examples"
CALCULATOR = EXAMPLES / "multi_turn_calculator.py"
LOCKSTEP = {  # what each example asserts of its own forward pass
    "synchronous.py": "assert torch.equal(output.logprobs, batch.rollout_logprobs)",
    "asynchronous.py": "assert output.logprobs[fresh].equal(batch.rollout_logprobs[fresh])",
    "multi_turn_calculator.py": "assert output.logprobs.equal(batch.rollout_logprobs)",
}


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


def run_here(code: str) -> str:
    """In this process and its Ray, which takes a third of the time."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example.py", "exec"), {"__name__": "__main__"})  # noqa: S102 (our own page)
    return printed.getvalue()


def test_readme_example_runs(tiny_model_dir: Callable[..., Path], tmp_path: Path):
    code = python_block("README.md").replace("smollm2-135m-instruct", str(tiny_model_dir("llama")))
    output = run_code(code, tmp_path)
    assert len(output.splitlines()) == 5  # four samples of the first prompt, then the sync
    assert output.splitlines()[-1].startswith("0 MB in ")


def test_every_example_is_short_and_is_run_here():
    assert {path.name for path in EXAMPLES.glob("*.py")} == LOCKSTEP.keys()
    for name in LOCKSTEP:
        lines = (EXAMPLES / name).read_text().splitlines()
        assert len([line for line in lines if line.strip() and not line.startswith('"""')]) < 40, name


@pytest.mark.slow
@pytest.mark.parametrize("name", LOCKSTEP)
def test_an_example_trains_in_lockstep(name: str, tiny_model_dir: Callable[..., Path], local_ray: None):
    code = (EXAMPLES / name).read_text()
    assert LOCKSTEP[name] in code
    code = code.replace("smollm2-135m-instruct", str(tiny_model_dir("llama"))).replace(", 20\n", ", 3\n", 1)
    output = run_here(code)
    assert [line.split(":")[0] for line in output.splitlines()] == ["step 0", "step 1", "step 2"]
    if name == "asynchronous.py":
        assert "100% of tokens fresh" in output.splitlines()[0]
        assert "100% of tokens fresh" not in output.splitlines()[-1]


def test_the_page_on_trainers_prints_the_synchronous_example():
    assert (EXAMPLES / "synchronous.py").read_text().endswith(f'"""\n\n{python_block("docs/custom_trainer.md")}')


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", ["synchronous.py", "asynchronous.py"])
def test_the_real_model_comes_nearer_to_seven_words(name: str, tmp_path: Path):
    lines = run_code((EXAMPLES / name).read_text(), tmp_path).splitlines()
    rewards = [float(re.search(r"reward (-?\d+\.\d+)", line)[1]) for line in lines]
    assert len(rewards) == 20
    assert sum(rewards[-5:]) > sum(rewards[:5])


def test_the_multi_turn_page_plays_as_printed(tiny_model_dir: Callable[..., Path], local_ray: None):
    code = python_block("docs/multi_turn.md").replace("smollm2-135m-instruct", str(tiny_model_dir("llama")))
    output = run_here(code)
    assert len(output.splitlines()) == 4
    assert all(re.match(r"(-0\.[123]\d* [123]|1\.0 1|0\.[89]\d* [23]) ['\"]", line) for line in output.splitlines())


def test_the_calculator_answers_what_the_model_asks_and_judges_what_it_says():
    definitions = CALCULATOR.read_text().partition("policy = Policy")[0]
    example: dict = {}
    exec(compile(definitions, str(CALCULATOR), "exec"), example)  # noqa: S102 (our own page)

    def said(text: str, is_last: bool = False) -> Observation:
        environment = example["Calculator"]()
        assert environment.reset({"question": "12*3-2", "answer": 34}, seed=0).endswith("Q: What is 12*3-2?\nA:")
        return environment.step(
            Turn(index=0, text=text, token_ids=[5], finish_reason="stop", stop_reason=None, is_last=is_last)
        )

    assert said(" <calc>12*3-2") == Observation(" = 34\n")
    assert said(" <calc>2 + 3 * 4") == Observation(" = 14\n")
    assert said("So it is 34.\n\n") == Observation(reward=1.0, is_done=True)
    assert said(" <calc>12*3-2", is_last=True) == Observation(reward=0.0, is_done=True)
    for text in ("So it is 340.", " <calc>__import__('os')", " <calc>9**9**9", " <calc>007", " <calc>2*", ""):
        assert said(text) == Observation(reward=0.0, is_done=True)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_model_calls_the_calculator_and_gets_better_at_it(tmp_path: Path):
    lines = run_code(CALCULATOR.read_text(), tmp_path).splitlines()
    rewards = [float(re.search(r"reward (\d\.\d+)", line)[1]) for line in lines]
    assert any("</calc> = " in line for line in lines)
    assert sum(rewards[-4:]) > sum(rewards[:4])


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
