"""Metrics: the figures of a training step under the names that dashboards know."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from rollout import Rollout
from trainers.advantages import has_spread
from trainers.losses import kl_estimate
from trainers.rewards import Rewards


def reward_metrics(rewards: Rewards) -> dict[str, float]:
    """reward/..., rewards/{function}/mean and frac_reward_zero_std; a mean over nothing is left out.

    reward/std is the mean over groups of the unbiased standard deviation inside a group, as TRL logs it.
    """
    is_valid = ~rewards.total.isnan()
    metrics = {
        "frac_reward_zero_std": 1.0 - has_spread(rewards.total).float().mean().item(),
        "reward/num_failed": rewards.num_failed,
        "reward/num_timed_out": rewards.num_timed_out,
        "reward/num_masked": int((~is_valid).sum()),
    }
    if is_valid.any():
        metrics["reward/mean"] = rewards.total.nanmean().item()
    deviations = [group[~group.isnan()].std() for group in rewards.total if (~group.isnan()).sum() > 1]
    if deviations:
        metrics["reward/std"] = torch.stack(deviations).mean().item()
    for name, values in rewards.by_function.items():
        if not values.isnan().all():
            metrics[f"rewards/{name}/mean"] = values.nanmean().item()
    return metrics


def response_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Lengths in tokens; clip_ratio and aborted_ratio are shares of the samples."""
    lengths = [len(rollout.token_ids) for rollout in rollouts]
    reasons = [rollout.finish_reason for rollout in rollouts]
    return {
        "response_length/mean": sum(lengths) / len(lengths),
        "response_length/max": max(lengths),
        "response_length/min": min(lengths),
        "response_length/clip_ratio": reasons.count("length") / len(reasons),
        "response/aborted_ratio": reasons.count("abort") / len(reasons),
    }


def mismatch_metrics(trainer_logprobs: torch.Tensor, rollout_logprobs: torch.Tensor) -> dict[str, float]:
    """How far the trainer's forward is from what the engine reported; every figure is exactly 0.0 in lockstep.

    trainer_logprobs, rollout_logprobs: [num_tokens] float32, under the version that drew the tokens.
    mismatch/kl is the k3 estimate of KL(engine || trainer). NaN on either side shows as NaN. Over no tokens, only
    the count is given: nothing was measured.
    """
    metrics: dict[str, float] = {"mismatch/num_tokens": trainer_logprobs.numel()}
    if trainer_logprobs.numel():
        difference = (trainer_logprobs - rollout_logprobs).abs()
        metrics["mismatch/logprob_abs_diff_mean"] = difference.mean().item()
        metrics["mismatch/logprob_abs_diff_max"] = difference.max().item()
        metrics["mismatch/kl"] = kl_estimate(rollout_logprobs, trainer_logprobs, "k3").mean().item()
    return metrics


class PhaseTimer:
    """Wall seconds of the phases of one step, which it announces as they begin."""

    def __init__(self, on_phase: Callable[[str], None] | None = None) -> None:
        self.on_phase = on_phase
        self.seconds: dict[str, float] = {}
        self.started = time.perf_counter()

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        if self.on_phase is not None:
            self.on_phase(phase)
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def metrics(self) -> dict[str, float]:
        """timing_s/{phase}, and timing_s/step since the timer was made."""
        phases = {f"timing_s/{phase}": seconds for phase, seconds in self.seconds.items()}
        return {**phases, "timing_s/step": time.perf_counter() - self.started}
