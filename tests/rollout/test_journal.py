from __future__ import annotations

import json
import os
import resource
import stat
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from engine import EngineConfig, SamplingParams
from rollout import Rollout
from rollout.journal import Journal, JournalError, JournalHeader, read_journal
from rollout.journal_format import FORMAT_VERSION, JournalledGroup

FINGERPRINT = "f1"
# the smallest and largest magnitudes, a negative zero, and neighbours that differ in the last bit
LOGPROBS = np.array([-0.0, -1e-45, -np.inf, -3.4e38, -0.1, np.nextafter(np.float32(-0.1), np.float32(0))], np.float32)
PARAMS = SamplingParams(
    n=2, temperature=0.7, top_p=0.9, max_tokens=9, min_tokens=2, stop=["</s>", "\n"], stop_token_ids=[7],
    logit_bias={5: -1.5, 3: 0.1}, allowed_token_ids=[3, 5, 7], bad_words=["é"],
)  # fmt: skip
HEADER = JournalHeader(
    seed=2**64 - 1,
    engine_options={"model": "m", "max_model_len": None},
    profile="float32",
    kernel_fingerprint=FINGERPRINT,
    weights_checksum="00ff",
)

SWITCH = {"kind": "switch", "policy_version": 1, "checksum": "ab", "mode": "wait", "weights": None}


def rollout(group_id: str = "g", index: int = 0, num_tokens: int = len(LOGPROBS), **changes) -> Rollout:
    whole = Rollout(
        group_id=group_id,
        index=index,
        prompt_token_ids=[5, 6, 7],
        token_ids=[100_000 + i for i in range(num_tokens)],
        logprobs=[float(LOGPROBS[i % len(LOGPROBS)]) for i in range(num_tokens)],
        policy_versions=[4 if i < 2 else 5 for i in range(num_tokens)],
        finish_reason="stop",
        stop_reason="</s>",
        text="not journalled",
        loss_mask=[1] * num_tokens,
        seed=2**64 - 2,
        sampling_params=PARAMS,
        is_exact=True,
        kernel_fingerprint=FINGERPRINT,
        metadata={"answer": object()},
    )
    return replace(whole, **changes)


def groups_in(directory: Path) -> list[JournalledGroup]:
    return [group for file in read_journal(directory).files for group in file.groups()]


def group_ids_in(directory: Path) -> list[str]:
    return [group.group_id for group in groups_in(directory)]


def test_a_group_comes_back_with_every_bit(tmp_path):
    given = [rollout(), rollout(index=1, stop_reason=7, is_exact=False, finish_reason="length")]
    empty = rollout("é/\n", num_tokens=0, finish_reason="abort", stop_reason=None)
    with Journal(tmp_path, HEADER, "a") as journal:
        journal.write_group(given)
        journal.write_group([empty])
    group, other = groups_in(tmp_path)
    assert (group.group_id, group.prompt_token_ids, group.params, group.seed) == ("g", [5, 6, 7], PARAMS, 2**64 - 2)
    for sample, source in zip(group.samples, given, strict=True):
        for name in ("index", "token_ids", "policy_versions", "finish_reason", "stop_reason", "is_exact"):
            assert getattr(sample, name) == getattr(source, name)
        assert np.array(sample.logprobs, np.float32).tobytes() == LOGPROBS.tobytes()
    assert (other.group_id, other.samples[0].token_ids) == ("é/\n", [])


def test_header_and_switches_come_back(tmp_path):
    with Journal(tmp_path, HEADER, "a") as journal:
        journal.write_switch(3, "ab", "recompute", tmp_path / "weights" / "v000003")
        journal.write_switch(4, "cd", "keep", None)
        journal.write_switch(5, "ef", "wait", "/elsewhere/v000005")
    [file] = read_journal(tmp_path).files
    assert file.header == HEADER
    assert [(s.policy_version, s.checksum, s.mode, s.weights_path) for s in file.switches] == [
        (3, "ab", "recompute", "weights/v000003"),
        (4, "cd", "keep", None),
        (5, "ef", "wait", "/elsewhere/v000005"),
    ]


def test_every_option_of_the_engine_is_in_the_header(tmp_path):
    config = EngineConfig("m", num_threads=3, num_blocks=17, device="cpu", numerics="bfloat16")
    header = JournalHeader.from_config(config, seed=1, kernel_fingerprint="f", weights_checksum=b"\x01\xff")
    Journal(tmp_path, header, "a").close()
    read = read_journal(tmp_path).files[0].header
    assert EngineConfig(**read.engine_options) == config
    assert (read.model, read.profile, read.weights_checksum) == ("m", "bfloat16", "01ff")


def test_a_record_is_in_the_system_before_the_call_returns(tmp_path):
    journal = Journal(tmp_path, HEADER, "a")
    for i in range(3):
        journal.write_group([rollout(f"g{i}")])
        assert group_ids_in(tmp_path) == [f"g{j}" for j in range(i + 1)]
    journal.close()


def test_only_the_owner_may_read_a_journal(tmp_path):
    old = os.umask(0)
    try:
        Journal(tmp_path / "new" / "run", HEADER, "a").close()
        (tmp_path / "open" / "journal").mkdir(parents=True)
        Journal(tmp_path / "open", HEADER, "a").close()
    finally:
        os.umask(old)
    modes = {p.relative_to(tmp_path).as_posix(): stat.S_IMODE(p.stat().st_mode) for p in tmp_path.rglob("*")}
    assert {modes[name] for name in ("new", "new/run", "new/run/journal", "open/journal")} == {0o700}
    assert modes["new/run/journal/a-000001.jsonl"] == modes["open/journal/a-000001.jsonl"] == 0o600
    assert modes["open"] == 0o777, "a run directory that was there is its maker's"


def test_files_are_rotated_by_size_and_each_stands_alone(tmp_path):
    with Journal(tmp_path, HEADER, "a", max_file_bytes=3000) as journal:
        for i in range(40):
            journal.write_group([rollout(f"g{i}")])
        journal.write_group([rollout("large", num_tokens=2000)])
        journal.write_group([rollout("last")])
    files = read_journal(tmp_path).files
    assert len(files) > 5
    assert {file.header == HEADER for file in files} == {True}
    assert all(file.num_bytes <= 3000 for file in files[:-2])
    assert [file.num_groups for file in files[-2:]] == [1, 1], "what is larger than a file has one of its own"
    assert group_ids_in(tmp_path) == [*(f"g{i}" for i in range(40)), "large", "last"]


def test_writers_never_share_a_file_not_even_under_one_name(tmp_path):
    writers = [Journal(tmp_path, HEADER, name) for name in ("a", "b", "a", "a-000001")]
    assert len({journal.path for journal in writers}) == 4
    for i in range(8):
        writers[i % 4].write_group([rollout(f"g{i}")])
    for journal in writers:
        journal.close()
    assert sorted(group_ids_in(tmp_path)) == [f"g{i}" for i in range(8)]


def test_writers_of_one_name_that_begin_at_once_have_a_file_each(tmp_path, monkeypatch):
    monkeypatch.setattr("rollout.journal._journal_files", lambda folder: [])  # each looked before the others began
    writers = [Journal(tmp_path, HEADER, "a") for _ in range(3)]
    assert [journal.path.name for journal in writers] == [f"a-00000{i}.jsonl" for i in (1, 2, 3)]
    for journal in writers:
        journal.close()


def test_threads_may_share_a_writer(tmp_path):
    with Journal(tmp_path, HEADER, "a", max_file_bytes=20_000) as journal:

        def write(name: str) -> None:
            for i in range(50):
                journal.write_group([rollout(f"{name}{i}", num_tokens=30)])

        threads = [threading.Thread(target=write, args=(name,)) for name in "xyz"]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert sorted(group_ids_in(tmp_path)) == sorted(f"{name}{i}" for name in "xyz" for i in range(50))


# What a crash leaves


def torn_journal(tmp_path: Path) -> tuple[Path, bytes]:
    with Journal(tmp_path, HEADER, "a") as journal:
        for i in range(3):
            journal.write_group([rollout(f"g{i}")])
    return journal.path, journal.path.read_bytes()


def test_a_torn_last_record_is_dropped_and_counted_wherever_it_was_cut(tmp_path):
    path, content = torn_journal(tmp_path)
    *_, start, end = [i + 1 for i, byte in enumerate(content) if byte == 10]
    for cut in (start + 1, (start + end) // 2, end - 1):
        path.write_bytes(content[:cut])
        [file] = read_journal(tmp_path).files
        assert (file.num_bytes, file.num_torn_bytes, file.num_groups) == (start, cut - start, 2)
        assert group_ids_in(tmp_path) == ["g0", "g1"]
    path.write_bytes(content[:start] + b"\0" * 100 + b"\n")  # a block that never reached the disk
    assert group_ids_in(tmp_path) == ["g0", "g1"]


def test_a_writer_that_comes_back_begins_a_new_file_behind_a_torn_one(tmp_path):
    path, content = torn_journal(tmp_path)
    path.write_bytes(content[:-5])
    with Journal(tmp_path, HEADER, "a") as journal:
        journal.write_group([rollout("later")])
    assert journal.path.name == "a-000002.jsonl"
    assert path.read_bytes() == content[:-5]
    assert group_ids_in(tmp_path) == ["g0", "g1", "later"]


def test_a_file_with_a_torn_header_holds_nothing_and_is_named(tmp_path):
    path, content = torn_journal(tmp_path)
    for torn in (b"", content[:20]):
        (path.parent / "b-000001.jsonl").write_bytes(torn)
        journal = read_journal(tmp_path)
        assert [p.name for p in journal.torn_files] == ["b-000001.jsonl"]
        assert [file.path for file in journal.files] == [path]


def test_records_behind_the_end_that_was_read_are_left_for_the_next_reader(tmp_path):
    journal = Journal(tmp_path, HEADER, "a")
    journal.write_group([rollout("early")])
    read = read_journal(tmp_path)
    journal.write_group([rollout("late")])
    assert [group.group_id for file in read.files for group in file.groups()] == ["early"]
    journal.close()


@pytest.mark.parametrize(
    ("number", "change", "message"),
    [
        (1, lambda entry: {**entry, "version": FORMAT_VERSION + 1}, "line 1: .*format has version 2.*reads up to 1"),
        (1, lambda entry: {**entry, "format": "other"}, "line 1: format='other' is not 'lockstep-journal'"),
        (1, lambda entry: SWITCH, "does not begin with a header"),
        (2, lambda entry: {**entry, "kind": "note"}, "line 2: kind='note' must be"),
        (2, lambda entry: {k: v for k, v in entry.items() if k != "prompt"}, "line 2: .*lacks.*'prompt'"),
        (2, lambda entry: {**entry, "samples": entry["samples"] * 2}, r"line 2: group 'g0' has samples \[0, 0\]"),
        (2, lambda entry: {**entry, "samples": [{**entry["samples"][0], "tokens": [1]}]}, "1 tokens, 6 log.* 6 pol"),
    ],
)  # fmt: skip
def test_damage_before_the_end_is_named_by_file_and_line(tmp_path, number, change, message):
    path, content = torn_journal(tmp_path)
    lines = content.splitlines()
    lines[number - 1] = json.dumps(change(json.loads(lines[number - 1]))).encode()
    path.write_bytes(b"\n".join(lines) + b"\n")
    with pytest.raises(JournalError, match=rf"(?s)a-000001\.jsonl.*{message}"):
        read_journal(tmp_path)


def test_reading_what_is_no_run_says_so(tmp_path):
    with pytest.raises(ValueError, match="nowhere is no directory"):
        read_journal(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"holds no journal: journal/\*\.jsonl is missing"):
        read_journal(tmp_path)


def test_wrong_use_is_refused_and_writes_nothing(tmp_path):
    for writer_id in ("", "a/b", "../a", ".a", "a" * 65, "é"):
        with pytest.raises(ValueError, match="writer_id="):
            Journal(tmp_path, HEADER, writer_id)
    with pytest.raises(ValueError, match="max_file_bytes=0"):
        Journal(tmp_path, HEADER, "a", max_file_bytes=0)
    assert not any(tmp_path.iterdir())
    journal = Journal(tmp_path, HEADER, "a")
    with pytest.raises(ValueError, match="empty"):
        journal.write_group([])
    with pytest.raises(ValueError, match=r"\['g', 'h'\]"):
        journal.write_group([rollout("g"), rollout("h")])
    with pytest.raises(AssertionError, match="fingerprint"):
        journal.write_group([rollout(kernel_fingerprint="f2")])
    journal.close()
    journal.close()
    with pytest.raises(ValueError, match="closed"):
        journal.write_group([rollout()])
    assert group_ids_in(tmp_path) == []


# A full disk

# Writes groups until the journal refuses, then prints what it heard and what a reader finds.
FILL = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_journal import HEADER, Journal, JournalError, group_ids_in, rollout
directory = Path(sys.argv[1])
journal, heard, num_written = Journal(directory, HEADER, "a", max_file_bytes={max_file_bytes}), [], 0
while not heard:
    try:
        journal.write_group([rollout(str(num_written), num_tokens=500)])
        num_written += 1
    except JournalError as error:
        heard.append(str(error))
for refused in (lambda: journal.write_group([rollout("after")]), lambda: journal.write_switch(1, "", "wait")):
    try:
        refused()
    except JournalError as error:
        heard.append(str(error))
journal.close()
content = journal.path.read_bytes() if journal.path.exists() else None
print(json.dumps([num_written, group_ids_in(directory), heard, content is None or content.endswith(b"\\n")]))
"""


def fill(prefix: list[str], directory: Path, max_file_bytes: int, limit: Callable[[], None] | None) -> tuple:
    script = textwrap.dedent(FILL).format(tests=str(Path(__file__).parent), max_file_bytes=max_file_bytes)
    run = subprocess.run(
        [*prefix, sys.executable, "-c", script, str(directory)],
        preexec_fn=limit, capture_output=True, text=True, timeout=120, check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    return tuple(json.loads(run.stdout))


def check_full_disk(outcome: tuple, errno_text: str) -> None:
    num_written, group_ids, heard, is_whole = outcome
    assert num_written > 3
    assert group_ids == [str(i) for i in range(num_written)]
    assert is_whole, "the record that did not fit was cut off again"
    assert errno_text in heard[0]
    assert "What was journalled before is whole. Make room" in heard[0]
    assert len(heard) == 3
    assert all("nothing more is journalled since" in refusal and errno_text in refusal for refusal in heard[1:])


def test_a_file_that_may_not_grow_stops_the_journal_and_harms_nothing(tmp_path):
    limit = 100_001
    outcome = fill([], tmp_path, 10**9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check_full_disk(outcome, "File too large")
    assert (tmp_path / "journal" / "a-000001.jsonl").stat().st_size > limit - 20_000
    with Journal(tmp_path, HEADER, "a") as journal:  # the way out works
        journal.write_group([rollout("after")])
    assert group_ids_in(tmp_path)[-1] == "after"


@pytest.mark.parametrize("max_file_bytes", [10**9, 30_000], ids=["one file", "rotated"])
def test_a_full_disk_stops_the_journal_and_harms_nothing(tmp_path, max_file_bytes):
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=256k tmpfs "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    check_full_disk(fill(mount, tmp_path, max_file_bytes, None), "No space left on device")


def test_a_journal_without_room_for_its_header_leaves_no_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(JournalError, match="File too large"):
            Journal(tmp_path, HEADER, "a")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list((tmp_path / "journal").iterdir())


def test_a_journal_that_cannot_begin_says_why(tmp_path):
    (tmp_path / "journal").write_text("in the way")
    with pytest.raises(JournalError, match=r"journal cannot be written: .*another run directory"):
        Journal(tmp_path, HEADER, "a")
