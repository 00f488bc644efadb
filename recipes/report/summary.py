"""Summary: what a run is and what it came to, as the tiles and tables at the top of its report."""

from __future__ import annotations

import calendar
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .curves import Curves

EXPECTED_REWARD, REWARD = "eval/expected_reward", "reward/mean"
MISMATCH, NUM_MISMATCH_TOKENS = "mismatch/logprob_abs_diff_max", "mismatch/num_tokens"
STARTED_FORMAT = "%Y-%m-%dT%H:%M:%S%z"


def title(config: Mapping[str, Any]) -> str:
    """ "smollm2-135m-instruct on sums"."""
    model, dataset = (Path(str(config.get(name, ""))).name for name in ("model", "dataset"))
    return f"{model} on {dataset}" if model and dataset else model or "A run"


def tiles(
    curves: Curves, config: Mapping[str, Any], environment: Mapping[str, Any], ended: float
) -> list[dict[str, Any]]:
    """What a reader wants to know first: {label, value, note} of each; what is not known is left out.

    ended: seconds since the epoch at which the run wrote its latest step.
    """
    found = [
        _change("Expected reward", curves, EXPECTED_REWARD, "exact, on held-out problems"),
        _change("Reward", curves, REWARD, "mean of a step's samples"),
        _mismatch(curves),
        _steps(curves, config),
        _duration(environment, ended),
        _code(_fingerprint(environment), environment.get("commit")),
    ]
    return [tile for tile in found if tile]


def _change(label: str, curves: Curves, name: str, note: str) -> dict[str, Any] | None:
    curve = curves.get(name)
    if curve.first is None or curve.last is None:
        return None
    value = f"{curve.last:.3f}" if curve.count == 1 else f"{curve.first:.3f} → {curve.last:.3f}"
    return {"label": label, "value": value, "note": note}


def _mismatch(curves: Curves) -> dict[str, Any] | None:
    curve, num_tokens = curves.get(MISMATCH), curves.get(NUM_MISMATCH_TOKENS).total
    if not curve.count and not curve.num_missing:
        return None
    over = f"over {num_tokens:,.0f} tokens"
    if curve.num_missing:
        return _bad_mismatch("not a number", f"in {curve.num_missing} steps, {over}")
    if curve.high == 0.0:
        note = f"{over}: every log-probability agrees bit for bit"
        return {"label": "Largest mismatch", "value": "0.0", "note": note, "state": "good"}
    return _bad_mismatch(f"{curve.high:.2g}", f"{over}: rollout and trainer differ")


def _bad_mismatch(value: str, note: str) -> dict[str, Any]:
    return {"label": "Largest mismatch", "value": value, "note": note, "state": "bad"}


def _steps(curves: Curves, config: Mapping[str, Any]) -> dict[str, Any]:
    num_steps = config.get("num_steps")
    shape = f"{config['num_prompts']} prompts × {config['group_size']} samples each" if _has_shape(config) else ""
    value = f"{curves.last_step:,} of {num_steps:,}" if isinstance(num_steps, int) else f"{curves.last_step:,}"
    return {"label": "Steps", "value": value, "note": shape}


def _has_shape(config: Mapping[str, Any]) -> bool:
    return "num_prompts" in config and "group_size" in config


def _duration(environment: Mapping[str, Any], ended: float) -> dict[str, Any] | None:
    try:
        started = time.strptime(str(environment.get("started")), STARTED_FORMAT)
    except ValueError:
        return None
    seconds = ended - _utc_seconds(started)
    note = f"from {time.strftime('%Y-%m-%d %H:%M', started)} to the latest step"
    return {"label": "Duration", "value": duration(seconds), "note": note}


def _utc_seconds(moment: time.struct_time) -> float:
    return calendar.timegm(moment) - (moment.tm_gmtoff or 0)


def duration(seconds: float) -> str:
    """ "42 s", "7 min 05 s", "3 h 20 min"."""
    minutes, seconds = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours:,} h {minutes:02d} min"
    return f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"


def _fingerprint(environment: Mapping[str, Any]) -> str | None:
    for part in ("engine", "trainer"):
        facts = environment.get(part)
        if isinstance(facts, Mapping) and facts.get("kernel_fingerprint"):
            return str(facts["kernel_fingerprint"])
    return None


def _code(fingerprint: str | None, commit: str | None) -> dict[str, Any] | None:
    """Both in full in the page, which cuts them off where room is short and shows them on demand."""
    if fingerprint:
        note = f"commit {commit}" if commit else ""
        return {"label": "Kernel fingerprint", "value": fingerprint, "note": note, "is_code": True}
    return {"label": "Commit", "value": commit, "note": "", "is_code": True} if commit else None
