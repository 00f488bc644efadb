"""Untrained groups: what a run has drawn, or has asked for, and not trained on yet, as JSON lines bit for bit.

groups.jsonl begins with a header line, {"format": ..., "version": ...}. Then comes a line for each group, in the order
of submission: `position` (its row's, in PromptOrder), `id`, and for a finished group `group`, the record that a journal
has of it (rollout/journal_format.py), `kernel_fingerprint`, and `samples` with what that record leaves out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rollout import Rollout
from rollout.journal_format import JournalledGroup, JournalledSample, group_line, parse_record
from trainers.checkpoint_manifest import CheckpointError

UNTRAINED_GROUPS = "groups.jsonl"
FORMAT_NAME = "lockstep-untrained-groups"
FORMAT_VERSION = 1
_PLAIN = ("text", "loss_mask", "raw_logprobs", "kept_mass")  # JSON keeps the bits of a float


@dataclass(frozen=True, slots=True, kw_only=True)
class UntrainedGroup:
    """A group that is finished and waits for its step, or that engines are to draw (again)."""

    position: int  # of its row, in PromptOrder
    group_id: str
    rollouts: tuple[Rollout, ...] | None = None  # by sample index; None if it was not finished


def write_groups(path: Path, groups: Iterable[UntrainedGroup]) -> None:
    """Raises ValueError for a group whose metadata JSON cannot carry."""
    with path.open("w", encoding="utf-8") as file:
        file.write(json.dumps({"format": FORMAT_NAME, "version": FORMAT_VERSION}) + "\n")
        file.writelines(json.dumps(_entry(group)) + "\n" for group in groups)


def read_groups(path: Path) -> list[UntrainedGroup]:
    """Raises CheckpointError, naming the place, for what is no such file."""
    groups: list[UntrainedGroup] = []
    try:
        with path.open(encoding="utf-8") as file:
            header = json.loads(next(file, "null"))
            if header != {"format": FORMAT_NAME, "version": FORMAT_VERSION}:
                raise ValueError(f"{header!r} is not the header of {FORMAT_NAME!r} version {FORMAT_VERSION}")
            for line in file:
                groups.append(_parse(json.loads(line)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path}, after {len(groups)} groups: {error!r}") from error
    return groups


def _entry(group: UntrainedGroup) -> dict[str, Any]:
    entry: dict[str, Any] = {"position": group.position, "id": group.group_id}
    if group.rollouts is None:
        return entry
    return entry | {
        "group": json.loads(group_line(group.rollouts)),
        "kernel_fingerprint": group.rollouts[0].kernel_fingerprint,
        "samples": [_sample_entry(rollout) for rollout in group.rollouts],
    }


def _sample_entry(rollout: Rollout) -> dict[str, Any]:
    metadata = dict(rollout.metadata)
    if not _survives_json(metadata):
        raise ValueError(
            f"rollout {rollout.group_id}[{rollout.index}] has metadata={metadata!r}, which JSON does not give back as "
            "it was: keep to text, numbers, lists and dictionaries with text as keys, or save no checkpoints"
        )
    return {
        **{name: getattr(rollout, name) for name in _PLAIN},
        "top_logprobs": _as_pairs(rollout.top_logprobs),
        "prompt_logprobs": _as_pairs(rollout.prompt_logprobs),
        "metadata": metadata,
    }


def _parse(entry: Mapping[str, Any]) -> UntrainedGroup:
    rollouts = tuple(_rollouts(entry)) if "group" in entry else None
    return UntrainedGroup(position=entry["position"], group_id=entry["id"], rollouts=rollouts)


def _rollouts(entry: Mapping[str, Any]) -> Iterator[Rollout]:
    group = parse_record(json.dumps(entry["group"]).encode())
    if not isinstance(group, JournalledGroup):
        raise ValueError(f"the record of group {entry['id']!r} is no group's")
    for sample, rest in zip(group.samples, entry["samples"], strict=True):
        yield _rollout(group, sample, rest, entry["kernel_fingerprint"])


def _rollout(
    group: JournalledGroup, sample: JournalledSample, rest: Mapping[str, Any], kernel_fingerprint: str
) -> Rollout:
    return Rollout(
        group_id=group.group_id,
        index=sample.index,
        prompt_token_ids=list(group.prompt_token_ids),
        token_ids=sample.token_ids,
        logprobs=sample.logprobs,
        policy_versions=sample.policy_versions,
        finish_reason=sample.finish_reason,
        stop_reason=sample.stop_reason,
        seed=group.seed,
        sampling_params=group.params,
        is_exact=sample.is_exact,
        kernel_fingerprint=kernel_fingerprint,
        metadata=rest["metadata"],
        top_logprobs=_from_pairs(rest["top_logprobs"]),
        prompt_logprobs=_from_pairs(rest["prompt_logprobs"]),
        **{name: rest[name] for name in _PLAIN},
    )


def _survives_json(value: Any) -> bool:
    try:
        return json.loads(json.dumps(value)) == value
    except (TypeError, ValueError):
        return False


def _as_pairs(tokens: list[Any] | None) -> list[Any] | None:
    """JSON would make text of the token ids that are keys."""
    return None if tokens is None else [None if one is None else list(one.items()) for one in tokens]


def _from_pairs(tokens: list[Any] | None) -> list[Any] | None:
    return None if tokens is None else [None if one is None else dict(one) for one in tokens]
