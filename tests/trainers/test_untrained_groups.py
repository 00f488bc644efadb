from __future__ import annotations

import dataclasses
import json
import struct

import numpy as np
import pytest

from engine import SamplingParams
from trainers.checkpoint_manifest import CheckpointError
from trainers.untrained_groups import UntrainedGroup, read_groups, write_groups

PARAMS = SamplingParams(n=2, temperature=0.7, max_tokens=4, stop=("\n", "END"), logprobs=1)


def float32s(*bits: int) -> list[float]:
    return np.array(bits, np.uint32).view(np.float32).tolist()


@pytest.fixture
def groups(make_rollout):
    fields = {"sampling_params": PARAMS, "seed": 2**63 + 1, "text": "ö✓\x00", "metadata": {"row": [1, {"a": None}]}}
    first = make_rollout(
        [1, 2],
        [3, 4],
        logprobs=float32s(0xBF000001, 0x80000001),  # a denormal among them
        policy_versions=[4, 5],
        loss_mask=[0, 1],
        raw_logprobs=[-0.1, -1e-45],
        kept_mass=[0.9, 1.0],
        top_logprobs=[{3: -0.25, 9: -1.5}, {4: -0.125}],
        prompt_logprobs=[None, {2: -3.0}],
        is_exact=False,
        stop_reason="END",
        **fields,
    )
    second = make_rollout([1, 2], [5], index=1, finish_reason="abort", **fields)
    return [
        UntrainedGroup(position=7, group_id="g0", rollouts=(first, second)),
        UntrainedGroup(position=8, group_id="g1"),
    ]


def test_groups_come_back_bit_for_bit(tmp_path, groups):
    write_groups(tmp_path / "groups.jsonl", groups)
    read = read_groups(tmp_path / "groups.jsonl")
    assert read == groups
    for sample, original in zip(read[0].rollouts, groups[0].rollouts, strict=True):
        for name in ("logprobs", "raw_logprobs", "kept_mass"):
            values = getattr(original, name) or []
            assert struct.pack(f"{len(values)}d", *values) == struct.pack(
                f"{len(values)}d", *(getattr(sample, name) or [])
            )


def test_metadata_that_json_would_change_is_refused(tmp_path, groups):
    for metadata in ({1: "a"}, {"a": (1, 2)}, {"a": object()}):
        rollout = dataclasses.replace(groups[0].rollouts[1], metadata=metadata)
        with pytest.raises(ValueError, match=r"g0\[1\] has metadata="):
            write_groups(tmp_path / "g", [UntrainedGroup(position=0, group_id="g0", rollouts=(rollout,))])


def test_what_is_no_such_file_is_refused(tmp_path, groups):
    path = tmp_path / "groups.jsonl"
    write_groups(path, groups)
    header, *lines = path.read_text().splitlines()
    path.write_text("\n".join([header.replace("1}", "2}"), *lines]))
    with pytest.raises(CheckpointError, match=r"is not the header of 'lockstep-untrained-groups' version 1"):
        read_groups(path)
    path.write_text("\n".join([header, lines[1], lines[0][:100]]))
    with pytest.raises(CheckpointError, match="after 1 groups"):
        read_groups(path)
    entry = json.loads(lines[0])
    del entry["samples"][0]
    path.write_text("\n".join([header, json.dumps(entry)]))
    with pytest.raises(CheckpointError, match="after 0 groups"):
        read_groups(path)
    path.write_text("")
    with pytest.raises(CheckpointError, match="None is not the header"):
        read_groups(path)
