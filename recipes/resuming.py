"""Resuming: a run's directory, problems and settings as a run that goes on from a checkpoint wants them."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from .options import Options, read_config
from .rewards import RewardFunction
from .run_directory import CHECKPOINTS, CONFIG, RunDirectory, ended_before_its_first_checkpoint


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
    num_problems = read_config(path / CONFIG, type(options)).get("num_problems")
    return dataclasses.replace(options, data=dataclasses.replace(options.data, num_problems=num_problems))


def settings_of_data(options: Options, reward: RewardFunction) -> dict[str, Any]:
    """What a resumed run must share beside the trainer's own settings, under the names of the options."""
    names = [field.name for field in dataclasses.fields(options.data) if field.name != "num_problems"]
    values = {name: getattr(options.data, name) for name in names}
    return values | {"dataset": Path(options.dataset).name, "reward": reward.__name__}


def words_of_resume(checkpoint: Path, step: int, run: RunDirectory) -> str:
    """What is gone on from, and what of the run that ended is given up."""
    cut = f"; {run.num_cut_lines} lines of later steps were cut off" if run.num_cut_lines else ""
    return f"going on from {checkpoint}, after step {step}{cut}"
