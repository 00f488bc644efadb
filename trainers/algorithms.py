"""Algorithms: the settings of GRPOConfig that make up each published algorithm, by its name.

It imports no torch, so that a command line can be parsed without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from trainers.choices import require_choice

AlgorithmName = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "reinforce_pp", "reinforce_pp_baseline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Algorithm:
    """A name, where it comes from, and what it sets; every other field of GRPOConfig is free."""

    title: str
    arxiv: str  # arXiv id of its paper
    settings: Mapping[str, Any]  # fields of GRPOConfig


def algorithm(name: str) -> Algorithm:
    """The algorithm of that name; ValueError lists the known ones."""
    require_choice("algorithm", name, AlgorithmName)
    return ALGORITHMS[name]


def _settings(**changes: Any) -> Mapping[str, Any]:
    """GRPO's settings with some changed: an algorithm names all of them, whatever GRPOConfig's defaults are."""
    grpo = {
        "objective": "clip",
        "ratio_level": "token",
        "clip_low": 0.2,
        "clip_high": 0.2,
        "dual_clip": None,
        "loss_aggregation": "seq-mean-token-mean",
        "advantage_scale": "std",
        "advantage_baseline": "mean",
        "whiten_advantages": False,
        "skip_zero_std_groups": True,
        "max_refills": 0,
        "kl_coef": 0.0,
        "kl_in": "loss",
        "kl_estimator": "k3",
    }
    return MappingProxyType(grpo | changes)


# As the papers have them, with the peers' one liberty: the KL to a reference is off where it is not what makes the
# algorithm (GRPO's paper has kl_coef=0.04), which spares a copy of the model.
ALGORITHMS: Mapping[str, Algorithm] = MappingProxyType(
    {
        "grpo": Algorithm(title="Group relative policy optimisation", arxiv="2402.03300", settings=_settings()),
        "dr_grpo": Algorithm(
            title="GRPO done right: without the biases of length and difficulty",
            arxiv="2503.20783",
            settings=_settings(advantage_scale="none", loss_aggregation="seq-mean-token-sum-norm"),
        ),
        "dapo": Algorithm(
            title="Clip-higher, a mean over tokens, and further prompts in place of groups without spread",
            arxiv="2503.14476",
            settings=_settings(clip_high=0.28, loss_aggregation="token-mean", max_refills=2),
        ),
        "gspo": Algorithm(
            title="Group sequence policy optimisation: one ratio for a whole sample",
            arxiv="2507.18071",
            settings=_settings(ratio_level="sequence", clip_low=3e-4, clip_high=4e-4),
        ),
        "cispo": Algorithm(
            title="Clipped importance weights that keep every token's gradient",
            arxiv="2506.13585",
            # no bound from below; TRL and ScaleRL (arXiv 2510.13786) hold the ratio under 5
            settings=_settings(objective="cispo", clip_low=1.0, clip_high=4.0, loss_aggregation="token-mean"),
        ),
        "rloo": Algorithm(
            title="REINFORCE leave one out: a whole sample is one action",
            arxiv="2402.14740",
            settings=_settings(
                ratio_level="sequence-product",
                advantage_baseline="leave_one_out",
                advantage_scale="none",
                kl_in="reward",
                kl_estimator="k1",
            ),
        ),
        "reinforce_pp": Algorithm(
            title="REINFORCE++: no groups, KL in each token's reward, advantages whitened over the batch",
            arxiv="2501.03262",
            settings=_settings(
                advantage_baseline="none",
                advantage_scale="none",
                whiten_advantages=True,
                skip_zero_std_groups=False,
                loss_aggregation="token-mean",
                kl_coef=0.01,
                kl_in="reward",
                kl_estimator="k1",
            ),
        ),
        "reinforce_pp_baseline": Algorithm(
            title="REINFORCE++ with the group's mean as baseline, whitened over the batch, KL in the loss",
            arxiv="2501.03262",
            settings=_settings(
                advantage_scale="none",
                whiten_advantages=True,
                skip_zero_std_groups=False,
                loss_aggregation="token-mean",
                kl_coef=0.01,
                kl_estimator="k2",
            ),
        ),
    }
)
