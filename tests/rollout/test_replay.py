from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from engine import Completion, EngineConfig, LLMEngine, SamplingParams
from rollout import Rollout
from rollout.journal import Journal, JournalHeader, read_journal
from rollout.journal_format import JournalledSample
from rollout.redraw import segments_of
from rollout.replay import main, replay
from rollout.replay_plan import Selection
from rollout.weight_archive import WeightArchive

Weights = dict[str, torch.Tensor]
Requests = dict[str, tuple[list[int], SamplingParams]]

LONG = SamplingParams(n=3, max_tokens=24, ignore_eos=True, seed=5)
# what draws from written-out logits, stops, is greedy, or asks for reports that are not journalled
PARAMS = [
    LONG,
    SamplingParams(n=2, max_tokens=30, temperature=0.8),
    SamplingParams(max_tokens=20, temperature=0.0, ignore_eos=True),
    SamplingParams(n=2, max_tokens=24, top_k=20, repetition_penalty=1.2, min_tokens=18, stop_token_ids=[40, 50, 60]),
    SamplingParams(n=2, max_tokens=24, top_p=0.9, logprobs=3, prompt_logprobs=1, stop=["e", " t"]),
]
PROMPTS = {f"g{i}": ([3 + i, 11, 13 + i, 17], params) for i, params in enumerate(PARAMS)}


def as_rollout(completion: Completion, requests: Requests, engine: LLMEngine) -> Rollout:
    prompt, params = requests[completion.request_id]
    names = (
        "index", "token_ids", "logprobs", "policy_versions", "finish_reason", "stop_reason", "text", "is_exact",
    )  # fmt: skip
    return Rollout(
        group_id=completion.request_id,
        prompt_token_ids=prompt,
        loss_mask=[1] * len(completion.token_ids),
        seed=params.seed,
        sampling_params=params,
        kernel_fingerprint=engine.kernel_fingerprint,
        metadata={},
        **{name: getattr(completion, name) for name in names},
    )


class Run:
    """An engine whose deliveries and updates are journalled, as a pool does it."""

    def __init__(self, directory: Path, config: EngineConfig, **retention: Any) -> None:
        self.directory = directory
        self.engine = LLMEngine(config)
        self.archive = WeightArchive(directory, config.model, **retention)
        header = JournalHeader.from_config(
            config,
            seed=0,
            kernel_fingerprint=self.engine.kernel_fingerprint,
            weights_checksum=self.engine.weights_checksum,
        )
        self.journal = Journal(directory, header, "run")
        self.requests: Requests = {}
        self.open: dict[str, list[Rollout]] = {}

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *_: object) -> None:
        self.journal.close()

    def add(self, requests: Requests) -> None:
        for i, (group_id, (prompt, params)) in enumerate(requests.items()):
            params = params if params.seed is not None else replace(params, seed=2**63 + i)
            self.requests[group_id] = prompt, params
            self.open[group_id] = []
            self.engine.add_request(group_id, prompt, params)

    def step(self, count: int) -> None:
        for _ in range(count):
            self.deliver(self.engine.step().finished)

    def drain(self) -> None:
        while self.engine.has_unfinished():
            self.step(1)

    def abort(self) -> None:
        self.deliver(self.engine.abort(list(self.open)))

    def deliver(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            rollouts = self.open[completion.request_id]
            rollouts.append(as_rollout(completion, self.requests, self.engine))
            if len(rollouts) == self.requests[completion.request_id][1].n:
                self.journal.write_group(sorted(self.open.pop(completion.request_id), key=lambda r: r.index))

    def update(self, version: int, weights: Weights, mode: str = "recompute") -> None:
        path = self.archive.save(version, weights)
        update = self.engine.update_weights(weights, version, mode)
        self.journal.write_switch(version, update.checksum.hex(), mode, path)


@pytest.fixture
def make_run(tmp_path: Path, config: EngineConfig) -> Callable[..., Run]:
    def make(**options: Any) -> Run:
        engine_options = {name: options.pop(name) for name in ("async_scheduling",) if name in options}
        return Run(tmp_path / "run", replace(config, **engine_options), **options)

    return make


@pytest.fixture
def mixed_run(make_run, make_weights) -> Path:
    """Rollouts of version 0, of 0 and 1, of 0 to 2, and of 2 alone."""
    with make_run() as run:
        run.add(PROMPTS)
        run.step(7)
        run.update(1, make_weights(1))
        run.step(6)
        run.update(2, make_weights(2))
        run.drain()
        run.add({f"late-{name}": request for name, request in PROMPTS.items()})
        run.drain()
    return run.directory


def samples_in(directory: Path) -> list[JournalledSample]:
    return [s for file in read_journal(directory).files for group in file.groups() for s in group.samples]


def edit(directory: Path, group_id: str, change: Callable[[dict], None]) -> None:
    """Changes the journalled group and leaves the file in order."""
    [path] = (directory / "journal").iterdir()
    lines = []
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        if entry.get("id") == group_id:
            change(entry)
        lines.append(json.dumps(entry) + "\n")
    path.write_text("".join(lines))


def run_main(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    capsys.readouterr()
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


@pytest.mark.parametrize("is_async", [False, True])
def test_a_run_of_one_version_comes_out_the_same(make_run, is_async):
    with make_run(async_scheduling=is_async) as run:
        run.add(PROMPTS)
        run.drain()
    report = replay(read_journal(run.directory))
    samples = samples_in(run.directory)
    assert {s.finish_reason for s in samples} == {"stop", "length"}
    assert report.num_replayable == report.num_equal == len(samples) == sum(params.n for params in PARAMS)
    assert report.num_tokens == sum(len(sample.token_ids) for sample in samples)


def test_rollouts_that_met_updates_come_out_the_same_segment_by_segment(mixed_run):
    samples = samples_in(mixed_run)
    lengths = [len(set(sample.policy_versions)) for sample in samples]
    assert {1, 3} <= set(lengths)
    assert {s.finish_reason for s in samples if len(set(s.policy_versions)) > 1} == {"stop", "length"}
    report = replay(read_journal(mixed_run))
    assert not report.differences
    assert not report.not_replayable
    assert report.num_equal == len(samples)
    assert report.num_tokens == sum(len(sample.token_ids) for sample in samples)


def test_samples_of_one_group_may_have_met_an_update_at_different_places(make_run, make_weights, config):
    with make_run() as run:
        run.engine = LLMEngine(replace(config, num_blocks=5))
        run.add({name: (prompt, LONG) for name, (prompt, _) in PROMPTS.items()})
        for version in range(1, 6):
            run.step(9)
            run.update(version, make_weights(version))
        run.drain()
    assert run.engine.stats().num_preemptions > 0
    groups = [group for file in read_journal(run.directory).files for group in file.groups()]
    places = [{tuple(s.end for s in segments_of(sample)) for sample in group.samples} for group in groups]
    assert any(len(ends) > 1 for ends in places), "no group was cut at several places"
    assert not replay(read_journal(run.directory)).differences


def test_aborted_rollouts_are_drawn_up_to_their_end(make_run, make_weights):
    with make_run() as run:
        run.add(PROMPTS)
        run.step(5)
        run.update(1, make_weights(1))
        run.step(5)
        run.abort()
        run.drain()
        run.add({"begun never": PROMPTS["g0"]})
        run.abort()
    assert {s.finish_reason for s in samples_in(run.directory)} >= {"abort"}
    report = replay(read_journal(run.directory))
    assert report.num_equal == sum(params.n for params in PARAMS)
    assert report.not_replayable == {"aborted before the first token": LONG.n}


@pytest.mark.parametrize("is_saved_again", [False, True])
def test_a_rollback_to_weights_that_are_kept_is_drawn_again(make_run, make_weights, monkeypatch, is_saved_again):
    with make_run() as run:
        run.add(PROMPTS)
        for version in (1, 2, 1):
            run.step(4)
            run.update(version, make_weights(version))
            if version == 2 and not is_saved_again:
                monkeypatch.setattr(run.archive, "save", lambda version, weights: None)
        run.drain()
    assert any(s.policy_versions[-1] == 1 and 2 in s.policy_versions for s in samples_in(run.directory))
    report = replay(read_journal(run.directory))
    assert report.num_equal == sum(params.n for params in PARAMS)


def test_two_sets_of_weights_under_one_number_are_named_and_not_compared(make_run, make_weights):
    with make_run() as run:
        for seed, version in enumerate((1, 2, 1)):
            run.update(version, make_weights(seed))
            run.add({f"g{seed}": PROMPTS["g0"]})
            run.drain()
    report = replay(read_journal(run.directory))
    assert report.not_replayable == {"version 1 names 2 different sets of weights": 2 * LONG.n}
    assert report.num_equal == LONG.n


def test_versions_that_were_not_kept_or_are_gone_are_named(make_run, make_weights, capsys):
    with make_run(keep_weights_every=2, keep_last=1) as run:
        for version in (1, 2, 3, 4):
            run.update(version, make_weights(version))
            run.add({f"g{version}": PROMPTS["g0"]})
            run.drain()
    report = replay(read_journal(run.directory))
    gone = run.directory / "weights" / "v000002"
    assert report.not_replayable == {
        "version 1 was not kept": LONG.n,
        f"version 2 is gone from {gone}": LONG.n,
        "version 3 was not kept": LONG.n,
    }
    assert report.num_equal == LONG.n
    status, out, _ = run_main(capsys, run.directory)
    assert status == 0
    assert "not replayable  9" in out
    assert "3: version 1 was not kept" in out
    status, out, err = run_main(capsys, run.directory, "--rollout", "g3")
    assert (status, "nothing that was selected can be drawn again" in err) == (2, True)
    assert "3: version 3 was not kept" in out
    status, _, err = run_main(capsys, run.directory, "--policy-version", 3)
    assert (status, "version 3 was not kept. Versions at hand: 0, 4" in err) == (2, True)


def test_what_went_on_with_old_keys_and_values_is_named_as_inexact(make_run, make_weights):
    with make_run() as run:
        run.add({"g0": PROMPTS["g0"]})
        run.step(5)
        run.update(1, make_weights(1), mode="keep")
        run.drain()
        run.add({"g1": PROMPTS["g0"]})
        run.drain()
    report = replay(read_journal(run.directory))
    assert report.not_replayable == {"inexact: went on with keys and values of older weights (mode='keep')": LONG.n}
    assert report.num_equal == LONG.n


def test_a_version_can_be_drawn_again_alone_though_others_are_gone(mixed_run, capsys):
    (mixed_run / "weights" / "v000002").rename(mixed_run / "elsewhere")
    report = replay(read_journal(mixed_run), Selection(policy_version=1))
    assert not report.differences
    assert not report.not_replayable
    assert report.num_tokens == sum(sample.policy_versions.count(1) for sample in samples_in(mixed_run))
    assert run_main(capsys, mixed_run, "--policy-version", 1)[0] == 0


# Tampering


@pytest.mark.parametrize("position", [0, 8, 23])
def test_a_changed_token_is_found(mixed_run, capsys, position):
    def change(group: dict) -> None:
        group["samples"][1]["tokens"][position] ^= 1

    before = next(g for f in read_journal(mixed_run).files for g in f.groups() if g.group_id == "g0").samples[1]
    edit(mixed_run, "g0", change)
    report = replay(read_journal(mixed_run), Selection(group_id="g0"))
    [difference] = report.differences.values()
    assert (difference.group_id, difference.index, difference.position) == ("g0", 1, position)
    assert difference.policy_version == before.policy_versions[position]
    assert difference.journalled.token_id == before.token_ids[position] ^ 1
    assert (difference.redrawn.token_id, difference.redrawn.logprob) == (
        before.token_ids[position],
        before.logprobs[position],
    )
    assert report.num_equal == LONG.n - 1
    status, out, _ = run_main(capsys, mixed_run, "--rollout", "g0")
    assert status == 1
    assert f"g0/1 differs at position {position} (version {difference.policy_version}): journal token" in out
    assert str(before.logprobs[position]) in out
    assert run_main(capsys, mixed_run, "--rollout", "g0/1")[0] == 1
    assert run_main(capsys, mixed_run, "--rollout", "g0/2")[0] == 0


@pytest.mark.parametrize("position", [0, 8, 23])
def test_one_changed_bit_of_a_log_probability_is_found(mixed_run, position):
    def change(group: dict) -> None:
        bits = np.frombuffer(base64.b64decode(group["samples"][2]["logprobs"]), np.uint32).copy()
        bits[position] ^= 1
        group["samples"][2]["logprobs"] = base64.b64encode(bits.tobytes()).decode()

    edit(mixed_run, "g0", change)
    report = replay(read_journal(mixed_run))
    [difference] = report.differences.values()
    assert (difference.index, difference.position) == (2, position)
    assert difference.journalled.token_id == difference.redrawn.token_id
    assert difference.journalled.logprob != difference.redrawn.logprob


def cut_off(sample: dict, num_tokens: int) -> None:
    logprobs = base64.b64decode(sample["logprobs"])[: 4 * num_tokens]
    sample.update(tokens=sample["tokens"][:num_tokens], versions=[[2, num_tokens]])
    sample["logprobs"] = base64.b64encode(logprobs).decode()


def test_a_shortened_rollout_and_a_changed_ending_are_found(mixed_run):
    edit(mixed_run, "late-g0", lambda group: cut_off(group["samples"][0], 20))
    edit(mixed_run, "late-g2", lambda group: group["samples"][0].update(finish="stop", stop=9))
    report = replay(read_journal(mixed_run))
    shortened, ending = sorted(report.differences.values(), key=lambda difference: difference.group_id)
    assert (shortened.position, shortened.journalled) == (20, "ended by 'length'")
    assert shortened.redrawn.token_id >= 0
    assert (ending.journalled, ending.redrawn) == ("ended by 'stop' (9)", "ended by 'length'")


def test_other_weights_than_the_run_had_are_refused(mixed_run, make_weights, tiny_model_dir, config, capsys):
    WeightArchive(mixed_run, config.model).save(1, make_weights(9))
    status, _, err = run_main(capsys, mixed_run)
    assert (status, "version 1 of the journal" in err, "changed since" in err) == (2, True, True)
    other = tiny_model_dir("llama", weights_seed=3)
    status, _, err = run_main(capsys, mixed_run, "--policy-version", 0, "--model", other)
    assert (status, "version 0 of the journal" in err, "--model" in err) == (2, True, True)
    assert run_main(capsys, mixed_run, "--policy-version", 0, "--model", config.model)[0] == 0


# The command


def test_what_cannot_be_found_is_an_error_of_the_user(mixed_run, tmp_path, capsys):
    for arguments, message in [
        ([tmp_path / "nowhere"], "nowhere is no directory"),
        ([tmp_path], "holds no journal"),
        ([mixed_run, "--rollout", "g99"], "has no rollout g99"),
        ([mixed_run, "--rollout", "g0/3"], "has no rollout g0/3"),
        ([mixed_run, "--rollout", "g0/x"], "has no rollout g0/x"),
        ([mixed_run, "--policy-version", 7], "the journal has no switch to version 7. Versions at hand: 0, 1, 2"),
        ([mixed_run, "--rollout", "late-g0", "--policy-version", 0], "no rollout late-g0 with tokens of version 0"),
    ]:
        status, out, err = run_main(capsys, *arguments)
        assert (status, out) == (2, "")
        assert err.startswith("error: ")
        assert message in err


def test_a_group_may_be_called_like_a_sample(make_run):
    with make_run() as run:
        run.add({"a": PROMPTS["g0"], "a/1": PROMPTS["g2"]})
        run.drain()
    journal = read_journal(run.directory)
    assert replay(journal, Selection(group_id="a/1")).num_equal == 1
    assert replay(journal, Selection(group_id="a", index=1)).num_equal == 1
    assert replay(journal).num_equal == 1 + LONG.n


def test_a_torn_tail_is_told_and_the_rest_compared(mixed_run, capsys):
    [path] = (mixed_run / "journal").iterdir()
    path.write_bytes(path.read_bytes()[:-100])
    (path.parent / "other-000001.jsonl").write_bytes(b'{"kind"')
    status, out, _ = run_main(capsys, mixed_run)
    assert status == 0
    assert "run-000001.jsonl: dropped" in out
    assert "other-000001.jsonl: dropped, not even its header is whole" in out


def test_runs_of_different_setups_share_a_journal(make_run, config):
    for max_model_len in (20, 25):
        with make_run() as run:
            run.engine = LLMEngine(replace(config, max_model_len=max_model_len))
            run.journal = Journal(
                run.directory,
                JournalHeader.from_config(
                    run.engine.config,
                    seed=0,
                    kernel_fingerprint=run.engine.kernel_fingerprint,
                    weights_checksum=run.engine.weights_checksum,
                ),
                "run",
            )
            run.add({f"g{max_model_len}": PROMPTS["g0"]})
            run.drain()
    assert {len(s.token_ids) for s in samples_in(run.directory)} == {16, 21}
    assert replay(read_journal(run.directory)).num_equal == 2 * LONG.n


def test_other_kernels_are_refused(mixed_run):
    [path] = (mixed_run / "journal").iterdir()
    header, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps({**json.loads(header), "kernel_fingerprint": "other"}) + "\n" + rest)
    with pytest.raises(ValueError, match=r"kernels here \(float32\) have fingerprint .* other: .*version of the code"):
        replay(read_journal(mixed_run))
