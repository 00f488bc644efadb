"""Journal format: what a run's journal records, and the JSON lines that carry it bit for bit."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np

from engine import EngineConfig, SamplingParams
from engine.outputs import FinishReason
from rollout.rollout import Rollout

FORMAT_NAME = "lockstep-journal"
FORMAT_VERSION = 1  # readers refuse a higher one; raise it with every change of a record
_FLOAT32 = np.dtype("<f4")


class JournalError(RuntimeError):
    """The journal cannot be written any more, or a file of it is damaged."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalHeader:
    """What all rollouts of one journal file were drawn with; the first record of the file."""

    seed: int  # the run's
    engine_options: Mapping[str, Any]  # the fields of EngineConfig; `model` holds the weights of version 0
    profile: str  # the numerics profile in force
    kernel_fingerprint: str
    weights_checksum: str  # hex, of version 0

    @classmethod
    def from_config(
        cls,
        config: EngineConfig,
        *,
        seed: int,
        kernel_fingerprint: str,
        weights_checksum: bytes,
        profile: str | None = None,
    ) -> JournalHeader:
        """weights_checksum: `LLMEngine.weights_checksum` before the first update. profile: the engines', which a
        machine without their device cannot tell from the config."""
        return cls(
            seed=seed,
            engine_options={field.name: getattr(config, field.name) for field in fields(config)},
            profile=profile or config.profile_name,
            kernel_fingerprint=kernel_fingerprint,
            weights_checksum=weights_checksum.hex(),
        )

    @property
    def model(self) -> str:
        return self.engine_options["model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalledSample:
    """One sample of a group; the lists have one entry per completion token."""

    index: int
    token_ids: list[int]
    logprobs: list[float]  # each exactly a float32
    policy_versions: list[int]
    finish_reason: FinishReason
    stop_reason: int | str | None
    is_exact: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalledGroup:
    """One delivered group, with all that its tokens depend on but the weights."""

    group_id: str
    prompt_token_ids: list[int]
    params: SamplingParams  # as the caller gave them; the seed in force is `seed`
    seed: int
    samples: tuple[JournalledSample, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionSwitch:
    """The engines took new weights."""

    policy_version: int
    checksum: str  # hex, of the weights
    mode: str
    weights_path: str | None  # of the retained weights, relative to the run directory where they lie in it


Record = JournalHeader | JournalledGroup | VersionSwitch


def header_line(header: JournalHeader, writer_id: str) -> bytes:
    return _line(
        {
            "kind": "header",
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "writer": writer_id,
            "time": round(time.time(), 3),
            "seed": header.seed,
            "profile": header.profile,
            "kernel_fingerprint": header.kernel_fingerprint,
            "weights_checksum": header.weights_checksum,
            "engine": dict(header.engine_options),
        }
    )


def group_line(rollouts: Sequence[Rollout]) -> bytes:
    """All samples of one group. Prompt and parameters are the group's, so they are taken from its first sample."""
    first = rollouts[0]
    params = {field.name: getattr(first.sampling_params, field.name) for field in fields(SamplingParams)}
    return _line(
        {
            "kind": "group",
            "id": first.group_id,
            "seed": first.seed,
            "params": params,
            "prompt": list(first.prompt_token_ids),
            "samples": [_sample_entry(rollout) for rollout in rollouts],
        }
    )


def switch_line(switch: VersionSwitch) -> bytes:
    return _line(
        {
            "kind": "switch",
            "time": round(time.time(), 3),
            "policy_version": switch.policy_version,
            "checksum": switch.checksum,
            "mode": switch.mode,
            "weights": switch.weights_path,
        }
    )


def parse_record(line: bytes) -> Record:
    """The record of one line; ValueError says what is wrong with it."""
    try:
        entry = json.loads(line)
        kind = entry["kind"]
        if kind == "group":
            return _parse_group(entry)
        if kind == "switch":
            return _parse_switch(entry)
        if kind == "header":
            return _parse_header(entry)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a record lacks or misuses an entry: {error!r}") from error
    raise ValueError(f"kind={kind!r} must be 'header', 'group' or 'switch'")


def _sample_entry(rollout: Rollout) -> dict[str, Any]:
    logprobs = np.array(rollout.logprobs, dtype=_FLOAT32)
    return {
        "index": rollout.index,
        "tokens": list(rollout.token_ids),
        "logprobs": base64.b64encode(logprobs.tobytes()).decode(),
        "versions": [[version, len(list(run))] for version, run in groupby(rollout.policy_versions)],
        "finish": rollout.finish_reason,
        "stop": rollout.stop_reason,
        "exact": rollout.is_exact,
    }


def _parse_header(entry: Mapping[str, Any]) -> JournalHeader:
    if entry["format"] != FORMAT_NAME:
        raise ValueError(f"format={entry['format']!r} is not {FORMAT_NAME!r}")
    if entry["version"] > FORMAT_VERSION:
        raise ValueError(
            f"the journal's format has version {entry['version']}, this code reads up to {FORMAT_VERSION}: use the "
            "version of the code that wrote it, or a later one"
        )
    return JournalHeader(
        seed=entry["seed"],
        engine_options=entry["engine"],
        profile=entry["profile"],
        kernel_fingerprint=entry["kernel_fingerprint"],
        weights_checksum=entry["weights_checksum"],
    )


def _parse_group(entry: Mapping[str, Any]) -> JournalledGroup:
    params = SamplingParams(**entry["params"])
    samples = tuple(_parse_sample(sample) for sample in entry["samples"])
    indices = [sample.index for sample in samples]
    if len(set(indices)) < len(indices) or not set(indices) <= set(range(params.n)):
        raise ValueError(f"group {entry['id']!r} has samples {indices}, of n={params.n} that its parameters ask for")
    return JournalledGroup(
        group_id=entry["id"],
        prompt_token_ids=entry["prompt"],
        params=params,
        seed=entry["seed"],
        samples=samples,
    )


def _parse_sample(entry: Mapping[str, Any]) -> JournalledSample:
    token_ids = entry["tokens"]
    logprobs = np.frombuffer(base64.b64decode(entry["logprobs"], validate=True), dtype=_FLOAT32).tolist()
    versions = _expanded(entry["versions"])
    if not len(token_ids) == len(logprobs) == len(versions):
        raise ValueError(
            f"sample {entry['index']} has {len(token_ids)} tokens, {len(logprobs)} log-probabilities and "
            f"{len(versions)} policy versions"
        )
    return JournalledSample(
        index=entry["index"],
        token_ids=token_ids,
        logprobs=logprobs,
        policy_versions=versions,
        finish_reason=entry["finish"],
        stop_reason=entry["stop"],
        is_exact=entry["exact"],
    )


def _parse_switch(entry: Mapping[str, Any]) -> VersionSwitch:
    return VersionSwitch(
        policy_version=entry["policy_version"],
        checksum=entry["checksum"],
        mode=entry["mode"],
        weights_path=entry["weights"],
    )


def _expanded(runs: Iterable[Sequence[int]]) -> list[int]:
    return [version for version, count in runs for _ in range(count)]


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, separators=(",", ":")).encode() + b"\n"
