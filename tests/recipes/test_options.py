from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from recipes.options import GRPOOptions, parse_options
from recipes.run import make_config
from recipes.run_directory import RunDirectory
from trainers import GRPOConfig
from trainers.algorithms import ALGORITHMS

CONFIGS = Path(__file__).resolve().parents[2] / "recipes" / "configs"


def write(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


def test_defaults_are_the_setting_that_learns_sums():
    values = parse_options([]).flat()
    expected = {
        "model": "smollm2-135m-instruct",
        "dataset": "sums",
        "num_steps": 60,
        "num_prompts": 16,
        "group_size": 8,
        "learning_rate": 3e-6,
        "betas": (0.9, 0.99),
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "warmup_steps": 3,
        "temperature": 1.0,
        "max_tokens": 5,
        "stop": ("\n",),
        "kl_coef": 0.0,
        "skip_zero_std_groups": True,
        "num_held_out": 64,
        "eval_every": 10,
    }
    assert {name: values[name] for name in expected} == expected


def test_other_data_sets_get_longer_completions_and_no_stop():
    options = parse_options(["--dataset", "chain_sum"])
    assert options.max_tokens == 256
    assert options.stop == ()


def test_stop_texts_may_be_written_with_a_backslash():
    assert parse_options(["--stop", "\\n", "END"]).stop == ("\n", "END")


def test_the_command_line_wins_over_the_file_and_the_file_over_the_defaults(tmp_path: Path):
    path = write(
        tmp_path / "run.yaml", "num_steps: 7\nlearning-rate: 1e-5\nshuffle_rewards: true\nstop: ['\\n', 'x']\n"
    )
    for arguments in (["--config", path, "--num-steps", "9"], [f"--config={path}", "--num-steps=9"]):
        values = parse_options(arguments).flat()
        assert values["num_steps"] == 9
        assert values["learning_rate"] == 1e-5
        assert values["shuffle_rewards"] is True
        assert values["stop"] == ("\n", "x")
        assert values["num_prompts"] == 16


def test_an_algorithm_sets_the_defaults_of_what_makes_it_up():
    for name, entry in ALGORITHMS.items():
        values = parse_options(["--algorithm", name]).flat()
        assert {field: values[field] for field in entry.settings} == dict(entry.settings)
        assert values["algorithm"] == name
        assert values["learning_rate"] == GRPOOptions().training.learning_rate
    values = parse_options(
        ["--algorithm=dapo", "--clip-high", "0.3", "--loss-aggregation", "seq-mean-token-sum"]
    ).flat()
    assert (values["clip_low"], values["clip_high"], values["loss_aggregation"]) == (0.2, 0.3, "seq-mean-token-sum")


def test_the_file_may_name_the_algorithm_and_its_options_win_over_the_preset(tmp_path: Path):
    path = write(tmp_path / "run.yaml", "algorithm: gspo\nclip_high: 0.001\n")
    values = parse_options(["--config", path]).flat()
    assert (values["ratio_level"], values["clip_low"], values["clip_high"]) == ("sequence", 3e-4, 0.001)
    values = parse_options(["--config", path, "--algorithm", "dr_grpo"]).flat()
    assert (values["algorithm"], values["ratio_level"], values["clip_high"]) == ("dr_grpo", "token", 0.001)


def test_an_unknown_algorithm_is_answered_with_the_known_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--algorithm", "ppg"])
    assert "reinforce_pp_baseline" in capsys.readouterr().err
    with pytest.raises(ValueError, match="algorithm can't be 'ppg'"):
        parse_options(["--config", write(tmp_path / "run.yaml", "algorithm: ppg\n")])


def test_the_options_of_every_algorithm_make_a_config(tmp_path: Path):
    from recipes.run import make_config
    from trainers import GRPOConfig

    for name, entry in ALGORITHMS.items():
        config = make_config(GRPOConfig, parse_options(["--algorithm", name]), tmp_path)
        assert {field: getattr(config, field) for field in entry.settings} == dict(entry.settings)


def test_an_unknown_key_in_the_file_is_answered_with_near_ones(tmp_path: Path):
    path = write(tmp_path / "run.yaml", "learning_rat: 1e-5\n")
    with pytest.raises(ValueError, match=r"no option 'learning_rat'; did you mean learning_rate"):
        parse_options(["--config", path])
    path = write(tmp_path / "run.yaml", "zzz: 1\n")
    with pytest.raises(ValueError, match=r"no option 'zzz'; the options are model, dataset"):
        parse_options(["--config", path])


def test_a_file_that_is_no_set_of_options_is_refused(tmp_path: Path):
    with pytest.raises(ValueError, match="No such file"):
        parse_options(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(ValueError, match="must hold option names with values"):
        parse_options(["--config", write(tmp_path / "list.yaml", "- a\n")])
    with pytest.raises(ValueError, match="is not valid YAML"):
        parse_options(["--config", write(tmp_path / "broken.yaml", "a: [1\n")])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rate: fast\n", "learning_rate can't be 'fast'"),
        ("num_steps: 3\nshuffle_rewards: 3\n", "shuffle_rewards can't be 3"),
        ("num_steps: [1, 2]\n", r"num_steps can't be \[1, 2\]"),
        ("betas: [0.9]\n", r"betas can't be \[0.9\]"),
        ("reward: perfect\n", "reward can't be 'perfect'"),
    ],
)
def test_a_value_in_the_file_that_does_not_fit_is_named(tmp_path: Path, text: str, message: str):
    with pytest.raises(ValueError, match=message):
        parse_options(["--config", write(tmp_path / "run.yaml", text)])


def test_values_in_the_file_may_not_contradict_one_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--config", write(tmp_path / "run.yaml", "system_prompt: Be brief.\n")])
    assert "needs chat=True" in capsys.readouterr().err
    options = parse_options(["--config", write(tmp_path / "run.yaml", "system_prompt: Be brief.\nchat: true\n")])
    assert options.data.system_prompt == "Be brief."


def test_an_unknown_option_ends_with_usage_and_the_nearest_one(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_info:
        parse_options(["--learning-rat", "1"])
    assert exit_info.value.code == 2
    assert "--learning-rate" in capsys.readouterr().err


def test_a_system_prompt_without_chat_is_refused(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        parse_options(["--system-prompt", "Be brief."])
    assert "needs" in capsys.readouterr().err


def test_a_resume_needs_a_place_and_keeps_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    here = ["--output-dir", str(tmp_path)]
    for arguments, message in (
        (["--resume", "auto"], "output_dir"),
        ([*here, "--resume", "x", "--overwrite"], "contradict"),
    ):
        with pytest.raises(SystemExit):
            parse_options(arguments)
        assert message in capsys.readouterr().err
    assert parse_options([*here, "--resume", "auto"]).resume == "auto"
    assert parse_options(["--resume", "none"]).resume is None
    assert parse_options([]).flat()["resume"] is None


def test_help_explains_every_option(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "100")  # wider, the panels stand side by side
    with pytest.raises(SystemExit) as exit_info:
        parse_options(["--help"])
    text = capsys.readouterr().out
    assert exit_info.value.code == 0
    for name in GRPOOptions().flat():
        entry = re.search(rf"^\W*--{name.replace('_', '-')}\b(.*?)\(default:", text, re.DOTALL | re.MULTILINE)
        assert entry is not None, name
        assert len(entry[1].split()) > 3, name


def test_a_run_can_be_repeated_from_its_own_config(tmp_path: Path):
    options = parse_options(
        [
            "--num-steps",
            "3",
            "--stop",
            "\n",
            "x",
            "--betas",
            "0.8",
            "0.9",
            "--chat",
            "--seed",
            "5",
            "--algorithm",
            "gspo",
        ]
    )
    run = RunDirectory(tmp_path / "run")
    run.write_config(options.flat())
    repeated = parse_options(["--config", str(tmp_path / "run" / "config.yaml")])
    assert repeated.flat() | {"config": None} == options.flat()
    assert "output_dir" not in yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())


def test_options_name_the_trainers_and_the_engines_fields():
    from engine import EngineConfig
    from trainers import GRPOConfig

    options = GRPOOptions().flat()
    for config_class in (GRPOConfig, EngineConfig):
        for field in dataclasses.fields(config_class):
            if field.name in options and field.default is not dataclasses.MISSING and field.name != "output_dir":
                assert options[field.name] == field.default, field.name
    of_neither = options.keys() - {f.name for f in (*dataclasses.fields(GRPOConfig), *dataclasses.fields(EngineConfig))}
    assert of_neither == {
        "algorithm", "dataset", "reward", "dry_run", "config", "dataset_subset", "dataset_split", "prompt_column",
        "answer_column", "chat", "system_prompt", "num_held_out", "num_problems", "overwrite", "num_logged_groups",
        "save_weights", "journal", "display", "tracker",
    }  # fmt: skip


def test_options_are_parsed_without_heavy_imports():
    code = (
        "import sys; from recipes.run import parse_options; parse_options([]); "
        "print([name for name in ('torch', 'ray', 'transformers', 'datasets', 'matplotlib') if name in sys.modules])"
    )
    start = time.monotonic()
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
    assert time.monotonic() - start < 10  # well under a second on an idle machine


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_files_that_come_along_are_taken(path: Path):
    options = parse_options(["--config", str(path)])
    given = yaml.safe_load(path.read_text())
    assert {name: options.flat()[name] for name in given if name != "output_dir"} == {
        name: value for name, value in given.items() if name != "output_dir"
    }
    assert make_config(GRPOConfig, options, Path()).num_steps == given["num_steps"]
