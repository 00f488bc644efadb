"""Run: from a recipe's options to a trained model and the files of the run; what `grpo_math` and `ppo_math` share.

Heavy imports wait until the run has said what it is about to do.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from .options import Options, parse_options
from .recorder import Recorder
from .resuming import resumed_directory, settings_of_data, with_problems_of_run, words_of_resume
from .rewards import RewardFunction, make_reward
from .run_directory import CHECKPOINTS, RunDirectory, default_path
from .token_texts import TokenTexts
from .trackers import Tracker, require_package

if TYPE_CHECKING:
    from engine import EngineConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """An algorithm, and what it can be told."""

    options_class: type[Options]
    classes: Callable[[], tuple[type, type]]  # (a config, its trainer): called late, since they import torch


def run_recipe(recipe: Recipe, arguments: Sequence[str] | None = None) -> int:
    """Runs it with the options of the command line; returns the process's exit code."""
    try:
        options = parse_options(sys.argv[1:] if arguments is None else arguments, recipe.options_class)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return exit_code(lambda: print_dry_run(recipe, options) if options.dry_run else train(recipe, options))


def train(recipe: Recipe, options: Options) -> None:
    """Trains as the options say and leaves the run's files in its output directory."""
    from trainers.checkpoint import CheckpointError

    path = options.output.output_dir or default_path(options.dataset, time.localtime())
    say_what_happens(options, path)

    with user_errors(always=CheckpointError):
        require_package(options.output.tracker)
        options = with_problems_of_run(options, path)
        problems = load(options)
        reward = make_reward(options.reward, options.dataset, problems.train_rows)
        held_out_rows = with_right_completions(problems.held_out_rows, reward, options)
        config_class, trainer_class = recipe.classes()
        config, engine_config = make_config(config_class, options, path), make_engine_config(options)
        run = None if options.resume else RunDirectory(path, options.output.overwrite)
        trainer = trainer_class(
            config,
            engine_config,
            problems.train_rows,
            [reward],
            eval_rows=held_out_rows,
            callbacks=[lambda metrics: recorder.record(metrics, trainer.batch, trainer.environment)],
            settings=settings_of_data(options, reward),
        )
        resumed, start = trainer.checkpoints.resumed, trainer.checkpoints.start
        run = run or resumed_directory(path, resumed, start.step)
        run.write_config(options.flat())
        run.write_environment({})

    display = make_run_display(options, path, len(held_out_rows))
    tracker = Tracker(options.output.tracker, path, options.flat())
    recorder = Recorder(run, display, options.output.num_logged_groups, TokenTexts(options.model), tracker)

    with contextlib.closing(run), display, user_errors(until=lambda: run.has_metrics, always=CheckpointError):
        if resumed:
            display.note(words_of_resume(resumed, start.step, run))
        try:
            trainer.train()
        finally:
            recorder.finish()

    for line in recorder.summary():
        display.note(line)


def print_dry_run(recipe: Recipe, options: Options) -> None:
    """What each engine would take of the machine's memory, and how many of the run's samples fit."""
    from engine.dry_run import DEFAULT_LENGTH, describe
    from engine.memory_plan import MemoryPlan
    from rollout.pool import within_gpu_share
    from trainers.gpu_shares import GPUShares

    with user_errors():
        config = make_config(recipe.classes()[0], options, Path())  # its mistakes are told as well
        engine_config = make_engine_config(options)
        shares = GPUShares.from_config(config, engine_config)
        plan = MemoryPlan.from_config(within_gpu_share(engine_config, shares.engine))
    if options.engine.num_engines > 1:
        print(f"each of {options.engine.num_engines} engines:")
    print(describe(plan, DEFAULT_LENGTH, options.max_tokens, options.sampling.group_size))


def say_what_happens(options: Options, path: Path) -> None:
    """The run's first line, printed before anything takes time."""
    print(
        f"Lockstep: {options.title} on {options.dataset} with {options.model}, {options.num_steps} steps of "
        f"{options.sampling.num_prompts} prompts x {options.sampling.group_size} samples; files go to {path}",
        flush=True,
    )


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


def make_config(config_class: type, options: Options, path: Path) -> Any:
    """The trainer's configuration: its fields are the options of the same names."""
    outputs = {
        "output_dir": str(path) if options.output.save_weights else None,
        "journal_dir": str(path) if options.output.journal else None,
        "checkpoint_dir": str(path / CHECKPOINTS) if options.output.checkpoint_every or options.resume else None,
    }
    return _configured(config_class, options.flat() | outputs)


def make_engine_config(options: Options) -> EngineConfig:
    """The engine's, likewise."""
    from engine import EngineConfig

    return _configured(EngineConfig, options.flat())


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
