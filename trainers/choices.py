"""Choices: the closed sets of names that loops, losses, advantages, corrections and their options share.

It imports no torch, so that a command line can be parsed without it.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

LoopMode = Literal["sync", "lagged", "async"]
StaleGroups = Literal["drop", "redraw"]
TrainerParallelism = Literal["ddp", "fsdp"]
RunningSamples = Literal["recompute", "keep", "wait"]
Objective = Literal["clip", "cispo", "reinforce"]
RatioLevel = Literal["token", "sequence", "sequence-product"]
Aggregation = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]
KLEstimator = Literal["k1", "k2", "k3"]
KLPlace = Literal["loss", "reward"]
AdvantageScale = Literal["std", "batch_std", "none"]
AdvantageBaseline = Literal["mean", "leave_one_out", "none"]
Correction = Literal[
    "none", "token-truncate", "token-mask", "sequence-truncate", "sequence-mask", "token-truncate-sequence-mask"
]


def require_choice(name: str, value: Any, choices: Any) -> None:
    """Raises ValueError, naming what there is, unless `value` is one of a Literal's."""
    known = get_args(choices)
    if value not in known:
        raise ValueError(f"{name}={value!r} must be one of {', '.join(map(repr, known))}")
