"""Schedule: the learning rate of an optimiser step as a function of the step's number, so that it needs no state."""

from __future__ import annotations

import math
from typing import Literal, get_args

LearningRateSchedule = Literal["constant", "linear", "cosine"]


def learning_rate_factor(
    step: int,
    *,
    schedule: LearningRateSchedule = "constant",
    warmup_steps: int = 0,
    num_steps: int | None = None,
) -> float:
    """The share of the full learning rate that optimiser step `step` (0 is the first) takes.

    It rises linearly over warmup_steps, the first step taking 1 / warmup_steps and the last of them all of it. Then it
    stays ("constant"), or falls to 0 at step num_steps, one past the last: on a straight line ("linear") or on half a
    wave ("cosine", arXiv 1608.03983 without restarts). Steps beyond num_steps take 0.

    Raises ValueError for an unknown schedule, or one that falls without num_steps.
    """
    check_schedule(schedule, num_steps)
    peak = max(warmup_steps - 1, 0)  # the step that takes all of it
    if step <= peak or schedule == "constant":
        return min(1.0, (step + 1) / max(1, warmup_steps))
    progress = min(1.0, (step - peak) / max(1, num_steps - peak))
    return 1.0 - progress if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def check_schedule(schedule: str, num_steps: int | None) -> None:
    """ValueError for an unknown schedule, or one that falls without a number of steps to fall over."""
    names = get_args(LearningRateSchedule)
    if schedule not in names:
        raise ValueError(f"learning_rate_schedule={schedule!r} must be one of {', '.join(map(repr, names))}")
    if schedule != "constant" and num_steps is None:
        raise ValueError(f"learning_rate_schedule={schedule!r} needs the number of optimiser steps that it falls over")
