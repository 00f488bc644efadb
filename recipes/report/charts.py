"""Charts: which metrics of a run are drawn together, and in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal

MAX_SERIES = 6  # lines that can be told apart in one chart
MAX_OTHER_CHARTS = 60


@dataclass(frozen=True, slots=True)
class Chart:
    """One chart. `series` maps a metric, or a pattern with `*`, to its label, where `*` stands for what it matched."""

    title: str
    series: dict[str, str]
    unit: str = ""
    kind: Literal["lines", "stack"] = "lines"
    zero: str = "0 at every step"  # what is said of a chart that shows nothing else


GROUPS: dict[str, tuple[Chart, ...]] = {
    "Reward": (
        Chart("Reward", {"reward/mean": "mean of the step's samples", "eval/expected_reward": "expected, held out"}),
        Chart("Pass@k, held out", {"eval/pass@*": "k = *"}, "share"),
        Chart("Reward by function", {"rewards/*/mean": "*"}),
        Chart("Spread within groups", {"reward/std": "standard deviation"}),
        Chart("Groups without spread", {"frac_reward_zero_std": "all rewards equal"}, "share of groups"),
        Chart(
            "Samples without a reward",
            {"reward/num_masked": "masked", "reward/num_failed": "failed", "reward/num_timed_out": "timed out"},
            "samples",
        ),
    ),
    "Lockstep": (
        Chart(
            "Mismatch",
            {"mismatch/logprob_abs_diff_max": "largest", "mismatch/logprob_abs_diff_mean": "mean"},
            "difference of log-probability",
            zero="exactly 0.0 at every step",
        ),
        Chart("Mismatch, KL", {"mismatch/kl": "KL(rollout ‖ trainer), k3"}, "nats", zero="exactly 0.0"),
        Chart("Staleness", {"staleness/mean": "mean", "staleness/max": "oldest"}, "versions behind"),
        Chart("Groups dropped as stale", {"staleness/dropped": "dropped"}, "groups"),
    ),
    "Policy": (
        Chart("Entropy", {"actor/entropy": "entropy"}, "nats per token"),
        Chart("KL", {"actor/ppo_kl": "to the rollouts' policy", "actor/kl_loss": "to the reference model"}, "nats"),
        Chart("Gradient norm", {"actor/grad_norm": "before clipping"}),
        Chart("Clip fraction", {"actor/pg_clipfrac": "clipped"}, "share of tokens"),
        Chart("Policy loss", {"actor/pg_loss": "loss"}),
        Chart("Learning rate", {"actor/lr": "actor", "critic/lr": "critic"}),
    ),
    "Critic": (
        Chart("Value loss", {"critic/vf_loss": "loss"}),
        Chart("Explained variance", {"critic/vf_explained_var": "of the returns"}, "share"),
        Chart("Values and returns", {"critic/values_mean": "values, mean", "critic/returns_mean": "returns, mean"}),
        Chart("Critic's gradient norm", {"critic/grad_norm": "before clipping"}),
        Chart("Value clip fraction", {"critic/vf_clipfrac": "clipped"}, "share of tokens"),
    ),
    "Responses": (
        Chart(
            "Response length",
            {
                "response_length/mean": "mean",
                "response_length/max": "longest",
                "response_length/min": "shortest",
            },
            "tokens",
        ),
        Chart(
            "Cut off",
            {"response_length/clip_ratio": "at max_tokens", "response/aborted_ratio": "aborted"},
            "share of samples",
        ),
    ),
    "Speed": (
        Chart(
            "Throughput",
            {"perf/rollout_tokens_per_second": "rollout", "perf/train_tokens_per_second": "training"},
            "tokens / s",
        ),
        Chart(
            "Time of a step",
            {
                "timing_s/rollout": "rollout",
                "timing_s/reward": "reward",
                "timing_s/train": "train",
                "timing_s/weight_sync": "weight sync",
                "timing_s/eval": "eval",
                "timing_s/*": "*",
            },
            "s",
            "stack",
        ),
        Chart("Pause for a weight sync", {"weight_sync/pause_seconds": "longest of the engines"}, "s"),
    ),
    "Engine": (
        Chart(
            "Requests",
            {"engine/num_requests_running": "running", "engine/num_requests_waiting": "waiting"},
            "samples",
        ),
        Chart("KV cache in use", {"engine/kv_cache_usage": "used"}, "share of blocks"),
        Chart("Prefix cache", {"engine/prefix_cache_hit_rate": "hits"}, "share of tokens"),
        Chart("Preemptions", {"engine/num_preemptions": "preemptions"}),
        Chart("Time to first token", {"engine/time_to_first_token_seconds": "mean"}, "s"),
    ),
}
WHOLE_STEP = "timing_s/step"  # the sum of a step's phases, not one of them
OTHER = "Other metrics"


def groups_of(names: Sequence[str]) -> list[dict[str, Any]]:
    """The groups of charts for which there are metrics, each in one chart; unknown ones come last, one by one."""
    left = [name for name in names if name != WHOLE_STEP]
    groups = []
    for title, charts in GROUPS.items():
        drawn = [_chart(chart, left) for chart in charts]
        groups.append({"title": title, "charts": [chart for chart in drawn if chart["series"]]})
    others = [_chart(Chart(name, {name: ""}), [name]) for name in left[:MAX_OTHER_CHARTS]]
    groups.append({"title": OTHER, "charts": others})
    return [group for group in groups if group["charts"]]


def _chart(chart: Chart, left: list[str]) -> dict[str, Any]:
    """The chart with the series that there are, which it takes out of `left`."""
    series = []
    for pattern, label in chart.series.items():
        found = [name for name in left if name == pattern or ("*" in pattern and fnmatchcase(name, pattern))]
        for name in found[: MAX_SERIES - len(series)]:
            left.remove(name)
            series.append({"name": name, "label": label.replace("*", _matched(name, pattern))})
    return {"title": chart.title, "unit": chart.unit, "kind": chart.kind, "zero": chart.zero, "series": series}


def _matched(name: str, pattern: str) -> str:
    """What `*` stands for in the name."""
    before, _, after = pattern.partition("*")
    return name.removeprefix(before).removesuffix(after)
