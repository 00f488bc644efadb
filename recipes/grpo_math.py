"""GRPO on problems whose answers can be checked: `python -m recipes.grpo_math`, every option explained by --help.

Without options it trains SmolLM2-135M-Instruct on sums and raises the exact probability of a right answer on 64
held-out sums. Heavy imports wait until the run has said what it is about to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import Columns, Problems, Row, as_chat, load_problems
from .display import (
    EXPECTED_REWARD,
    MISMATCH,
    RESPONSE_LENGTH,
    REWARD,
    ROLLOUT_SPEED,
    TRAIN_SPEED,
    PlainDisplay,
    Progress,
    make_display,
)
from .exits import EXIT_USER_ERROR, exit_code, user_errors
from .options import Options, parse_options, read_config
from .recorder import Recorder
from .rewards import RewardFunction, make_reward
from .run_directory import CHECKPOINTS, CONFIG, RunDirectory, default_path, ended_before_its_first_checkpoint

if TYPE_CHECKING:
    from engine import EngineConfig
    from trainers import GRPOConfig


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the recipe; returns the process's exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return exit_code(lambda: print_dry_run(options) if options.dry_run else train(options))


def train(options: Options) -> None:
    """Trains as the options say and leaves the run's files in its output directory."""
    from trainers.checkpoint import CheckpointError

    path = options.output.output_dir or default_path(options.dataset, time.localtime())
    say_what_happens(options, path)

    with user_errors(always=CheckpointError):
        options = with_problems_of_run(options, path)
        problems = load(options)
        reward = make_reward(options.reward, options.dataset, problems.train_rows)
        held_out_rows = with_right_completions(problems.held_out_rows, reward, options)
        grpo_config, engine_config = make_configs(options, path)
        run = None if options.resume else RunDirectory(path, options.output.overwrite)

        from trainers import GRPOTrainer

        trainer = GRPOTrainer(
            grpo_config,
            engine_config,
            problems.train_rows,
            [reward],
            eval_rows=held_out_rows,
            callbacks=[lambda metrics: recorder.record(metrics, trainer.batch, trainer.environment)],
            settings=settings_of_data(options, reward),
        )
        run = run or resumed_directory(path, trainer.checkpoints.resumed, trainer.checkpoints.start.step)
        run.write_config(options.flat())
        run.write_environment({})

    display = make_run_display(options, path, len(held_out_rows))
    recorder = Recorder(run, display, options.output.num_logged_groups)

    with contextlib.closing(run), display, user_errors(until=lambda: run.has_metrics, always=CheckpointError):
        if trainer.checkpoints.resumed:
            display.note(words_of_resume(trainer.checkpoints.resumed, trainer.checkpoints.start.step, run))
        try:
            trainer.train()
        finally:
            recorder.finish()

    for line in recorder.summary():
        display.note(line)


def print_dry_run(options: Options) -> None:
    """What each engine would take of the machine's memory, and how many of the run's samples fit."""
    from engine.dry_run import DEFAULT_LENGTH, describe
    from engine.memory_plan import MemoryPlan

    with user_errors():
        _, engine_config = make_configs(options, Path())
        plan = MemoryPlan.from_config(engine_config)
    if options.engine.num_engines > 1:
        print(f"each of {options.engine.num_engines} engines:")
    print(describe(plan, DEFAULT_LENGTH, options.max_tokens, options.sampling.group_size))


def say_what_happens(options: Options, path: Path) -> None:
    """The run's first line, printed before anything takes time."""
    print(
        f"Lockstep: GRPO on {options.dataset} with {options.model}, {options.num_steps} steps of "
        f"{options.sampling.num_prompts} prompts x {options.sampling.group_size} samples; files go to {path}",
        flush=True,
    )


def words_of_resume(checkpoint: Path, step: int, run: RunDirectory) -> str:
    """What is gone on from, and what of the run that ended is given up."""
    cut = f"; {run.num_cut_lines} lines of later steps were cut off" if run.num_cut_lines else ""
    return f"going on from {checkpoint}, after step {step}{cut}"


def resumed_directory(path: Path, checkpoint: Path | None, step: int) -> RunDirectory:
    """The directory of a run that goes on: the one it had if the checkpoint lies in it, else a new one.

    Without a checkpoint (--resume auto) the run begins, also where one ended before its first checkpoint was due.
    """
    if checkpoint is not None and checkpoint.parent == (path / CHECKPOINTS).absolute():
        return RunDirectory(path, after_step=step)
    return RunDirectory(path, overwrite=checkpoint is None and ended_before_its_first_checkpoint(path))


def with_problems_of_run(options: Options, path: Path) -> Options:
    """The options with as many problems as the run that goes on had generated, whatever its steps are now."""
    if not options.resume or options.data.num_problems is not None or not (path / CONFIG).exists():
        return options
    num_problems = read_config(path / CONFIG).get("num_problems")
    return dataclasses.replace(options, data=dataclasses.replace(options.data, num_problems=num_problems))


def settings_of_data(options: Options, reward: RewardFunction) -> dict[str, Any]:
    """What a resumed run must share beside the trainer's own settings, under the names of the options."""
    names = [field.name for field in dataclasses.fields(options.data) if field.name != "num_problems"]
    values = {name: getattr(options.data, name) for name in names}
    return values | {"dataset": Path(options.dataset).name, "reward": reward.__name__}


def load(options: Options) -> Problems:
    """The problems to train on and those held out, as the model is to be asked."""
    problems = load_problems(
        options.dataset,
        num_held_out=options.data.num_held_out,
        num_rows=options.num_problems,
        seed=options.seed,
        split=options.data.dataset_split,
        subset=options.data.dataset_subset,
        columns=Columns(prompt=options.data.prompt_column, answer=options.data.answer_column),
    )
    return as_chat(problems, options.data.system_prompt) if options.data.chat else problems


def with_right_completions(rows: Sequence[Row], reward: RewardFunction, options: Options) -> list[Row]:
    """Held-out rows with the completions whose probabilities add up to the expected reward.

    They can be listed under exact_match alone: the answer, with and without a space before it, and an ending. For
    other rewards no row comes back, and the run has no expected reward.
    """
    if reward.__name__ != "exact_match" or not rows:
        return []
    endings = options.stop or (end_of_text(options.model),)
    # A completion with an ending that contains another one is counted with that one.
    endings = [text for text in endings if not any(other in text for other in endings if other != text)]
    return [
        {**row, "right_completions": [text + end for text in spellings(row["answer"]) for end in endings]}
        for row in rows
    ]


def spellings(answer: str) -> list[str]:
    """The texts that exact_match takes for the answer and that a model may well write."""
    return list(dict.fromkeys([answer, f" {answer.strip()}", answer.strip()]))


def end_of_text(model: str) -> str:
    """The text of the model's end token, which ends a completion where no stop text does."""
    from engine.checkpoint import resolve_model
    from engine.tokenizer import load_tokenizer

    text = getattr(load_tokenizer(resolve_model(model)), "eos_token", None)
    if text is None:
        raise ValueError(f"model={model!r} has no tokenizer with an end token: give a --stop text, or another --reward")
    return text


def make_configs(options: Options, path: Path) -> tuple[GRPOConfig, EngineConfig]:
    """The trainer's and the engine's configuration: their fields are the options of the same names."""
    from engine import EngineConfig
    from trainers import GRPOConfig

    values = options.flat() | {
        "output_dir": str(path) if options.output.save_weights else None,
        "journal_dir": str(path) if options.output.journal else None,
        "checkpoint_dir": str(path / CHECKPOINTS) if options.output.checkpoint_every or options.resume else None,
    }
    return _configured(GRPOConfig, values), _configured(EngineConfig, values)


def make_run_display(options: Options, path: Path, num_held_out: int) -> PlainDisplay:
    """The display, with words for what its figures count."""
    progress = Progress(
        title=f"{Path(options.model).name} on {Path(options.dataset).name}",
        num_steps=options.num_steps,
        output_dir=str(path),
        details={
            EXPECTED_REWARD: f"{num_held_out} held-out problems",
            REWARD: f"{options.sampling.num_prompts} prompts x {options.sampling.group_size} samples",
            RESPONSE_LENGTH: "tokens",
            ROLLOUT_SPEED: "tokens/s",
            TRAIN_SPEED: "tokens/s",
            MISMATCH: f"every {'' if options.training.check_all_groups else 'trained '}token, bit for bit",
        },
        phase="starting Ray, engine and trainer",
    )
    return make_display(progress, options.output.display)


def _configured(config_class: type, values: dict[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(config_class)}
    return config_class(**{name: value for name, value in values.items() if name in names})


if __name__ == "__main__":
    sys.exit(main())
