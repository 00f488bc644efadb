from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from recipe_runs import read_lines, start_run

from recipes.options import GRPOOptions, parse_options
from recipes.ppo_math import RECIPE
from recipes.ppo_options import PPOOptions
from recipes.run import make_config
from trainers import GRPOConfig, PPOConfig


def test_defaults_are_those_of_the_configuration(tmp_path: Path):
    config = make_config(PPOConfig, parse_options([], PPOOptions), tmp_path)
    assert config == PPOConfig(output_dir=str(tmp_path))
    assert make_config(GRPOConfig, parse_options([], GRPOOptions), tmp_path) == GRPOConfig(output_dir=str(tmp_path))


def test_every_training_option_is_one_of_the_configuration():
    options = parse_options(["--critic-learning-rate", "1e-4", "--value-clip", "None", "--seed", "3"], PPOOptions)
    config_class, _ = RECIPE.classes()
    config = make_config(config_class, options, Path("unused"))
    assert (config.critic_learning_rate, config.value_clip, config.seed) == (1e-4, None, 3)
    values = options.flat()
    fields = set(config.__dataclass_fields__)
    assert set(vars_of(options.training)) <= fields
    assert "num_iterations" not in values


def vars_of(options: object) -> list[str]:
    return list(type(options).__dataclass_fields__)


def test_a_file_of_the_other_recipe_is_answered_with_near_options(tmp_path: Path):
    path = tmp_path / "grpo.yaml"
    path.write_text("advantage_scale: none\n")
    with pytest.raises(ValueError, match=r"no option 'advantage_scale'"):
        parse_options(["--config", str(path)], PPOOptions)
    path.write_text("gae_lambda: 0.9\nvalue_clip: null\n")
    training = parse_options(["--config", str(path)], PPOOptions).training
    assert (training.gae_lambda, training.value_clip) == (0.9, None)


def test_a_run_leaves_a_complete_directory_and_nothing_running(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], likely_data: str
):
    run = start_run(
        "ppo_math", tiny_model_dir(), likely_data, tmp_path / "run", "--num-steps", "2", "--num-logged-groups", "4"
    )
    printed = run.wait()
    assert run.process.returncode == 0, printed
    assert run.processes_after(10) == []
    assert printed.startswith("Lockstep: PPO on ")

    metrics = read_lines(run.output_dir / "metrics.jsonl")
    assert [line["step"] for line in metrics] == [0, 1, 2]
    assert "eval/expected_reward" in metrics[2]
    for line in metrics[1:]:
        assert line["mismatch/logprob_abs_diff_max"] == 0.0
        assert line["actor/first_ratio_abs_diff_max"] == 0.0
        assert line["mismatch/num_tokens"] == 4 * 8
        assert line["actor/grad_norm"] > 0
        assert line["critic/grad_norm"] > 0

    config = yaml.safe_load((run.output_dir / "config.yaml").read_text())
    assert (config["num_epochs"], config["critic_learning_rate"], config["num_steps"]) == (2, 1e-5, 2)
    first = [line for line in read_lines(run.output_dir / "rollouts.jsonl") if line["step"] == 1]
    assert [line["advantage"] for line in first] == [line["reward"] for line in first]  # values begin at zero
    assert {line["reward"] for line in first} == {0.0, 1.0}
    assert {"config.json", "model.safetensors"} <= {path.name for path in (run.output_dir / "weights").iterdir()}
    assert "step 1/2 | reward " in printed
    assert "mismatch 0.0" in printed
