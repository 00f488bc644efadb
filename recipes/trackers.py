"""Trackers: TensorBoard and Weights & Biases, through accelerate, for those who watch many runs in one place."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from .run_directory import TRACKERS

TrackerName = Literal["none", "tensorboard", "wandb"]
PROJECT = "lockstep"
PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}  # any of these does


class Tracker:
    """Logs a run's metrics to a tracker under OUTPUT_DIR/trackers; with the name "none" to nothing.

    W&B reads its own environment variables: WANDB_MODE=offline keeps a run on the disk, WANDB_PROJECT does not count.
    Raises ValueError where the tracker's package is not installed.
    """

    def __init__(self, name: TrackerName, output_dir: Path, options: Mapping[str, Any]) -> None:
        self._accelerator = None
        if name == "none":
            return
        require_package(name)
        from accelerate import Accelerator

        directory = output_dir / TRACKERS
        directory.mkdir(parents=True, exist_ok=True)
        # It only passes metrics on: the trainer is another process, with an accelerator of its own.
        self._accelerator = Accelerator(cpu=True, log_with=name, project_dir=str(directory))
        kwargs = {"wandb": {"dir": str(directory), "name": output_dir.name}} if name == "wandb" else {}
        self._accelerator.init_trackers(PROJECT, config=_plain(options), init_kwargs=kwargs)

    def log(self, metrics: Mapping[str, float]) -> None:
        """One step's metrics, under their own names; what is no finite number is left out."""
        if self._accelerator is None:
            return
        values = {name: value for name, value in metrics.items() if name != "step" and math.isfinite(value)}
        self._accelerator.log(values, step=int(metrics["step"]))

    def finish(self) -> None:
        """Ends the run for the tracker, and waits until what it was told is written."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None


def require_package(name: TrackerName) -> None:
    """Raises ValueError where a tracker lacks its package."""
    packages = PACKAGES.get(name, ())
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ValueError(
            f"tracker={name!r} needs the package {packages[0]!r}, which is not installed: "
            f"pip install {packages[0]}, or leave --tracker out; metrics.jsonl and report.html are written anyway"
        )


def _plain(options: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """Options in the types that every tracker takes."""
    return {
        name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in options.items()
    }
