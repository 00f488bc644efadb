from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from trainers.checkpoint import CheckpointError, CheckpointFolder, find_checkpoint
from trainers.checkpoint_manifest import MANIFEST, verify


def write_parts(directory: Path, text: str) -> None:
    (directory / "model").mkdir()
    (directory / "model" / "config.json").write_text(text)
    (directory / "weights.bin").write_bytes(text.encode() * 100)


def save(folder: CheckpointFolder, *steps: int) -> None:
    for step in steps:
        with folder.writing(step) as directory:
            write_parts(directory, f"step {step}")


def save_and(folder: CheckpointFolder, step: int, then: Callable[[], object]) -> None:
    with folder.writing(step) as directory:
        write_parts(directory, f"step {step}")
        then()


def interrupt() -> None:
    raise KeyboardInterrupt


def fail(*arguments: object, **options: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def names(folder: CheckpointFolder) -> list[str]:
    return sorted(path.name for path in folder.directory.iterdir())


@pytest.fixture
def folder(tmp_path: Path) -> CheckpointFolder:
    return CheckpointFolder(tmp_path / "checkpoints", keep=2)


def test_a_checkpoint_lists_its_files_with_size_and_checksum(folder):
    save(folder, 20)
    path = folder.path(20)
    assert path.name == "step-000020"
    manifest = json.loads((path / MANIFEST).read_text())
    assert (manifest["format"], manifest["version"]) == ("lockstep-checkpoint", 1)
    assert manifest["files"] == {
        name: {"size": len(data := (path / name).read_bytes()), "sha256": hashlib.sha256(data).hexdigest()}
        for name in ("model/config.json", "weights.bin")
    }
    assert folder.newest_good() == find_checkpoint("auto", folder.directory) == path


def test_a_checkpoint_appears_whole_or_not_at_all(folder):
    with folder.writing(10) as directory:
        write_parts(directory, "10")
        assert folder.steps() == []
        assert directory.parent == folder.directory  # a rename never crosses file systems
    assert folder.steps() == [10]
    with pytest.raises(KeyboardInterrupt):
        save_and(folder, 20, interrupt)
    assert names(folder) == ["step-000010"]


def test_only_so_many_stay_and_the_newest_always_does(folder):
    save(folder, 10, 20, 30)
    assert folder.steps() == [20, 30]
    one = CheckpointFolder(folder.directory, keep=1)
    save(one, 40)
    assert names(one) == ["step-000040"]
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointFolder(folder.directory, keep=0)


def test_nothing_is_removed_before_the_new_one_is_complete(folder, monkeypatch):
    save(folder, 10, 20)
    seen = []
    remove = CheckpointFolder._remove
    monkeypatch.setattr(
        CheckpointFolder, "_remove", lambda self, path: (verify(self.path(30)), seen.append(path), remove(self, path))
    )
    save(folder, 30)
    assert [path.name for path in seen] == ["step-000010"]


def test_a_torn_checkpoint_does_not_take_a_good_ones_place(folder):
    save(folder, 10, 20)
    (folder.path(20) / "weights.bin").unlink()
    save(folder, 30)
    assert folder.steps() == [10, 20, 30], "10 is the only good one before 30"
    save(folder, 40)
    assert folder.steps() == [20, 30, 40]


def test_the_same_step_is_replaced(folder):
    save(folder, 10)
    with folder.writing(10) as directory:
        write_parts(directory, "again")
    assert (folder.newest_good() / "model" / "config.json").read_text() == "again"
    assert names(folder) == ["step-000010"]


def cut(path: Path) -> None:
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray((path / "weights.bin").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "weights.bin").write_bytes(data)


def change_manifest(**entries: object):
    def change(path: Path) -> None:
        manifest = json.loads((path / MANIFEST).read_text())
        (path / MANIFEST).write_text(json.dumps(manifest | entries))

    return change


TORN = {
    "cut": (cut, r"weights.bin has 699 bytes instead of 700"),
    "flipped": (flip, r"weights.bin is damaged: its checksum"),
    "file missing": (lambda path: (path / "model" / "config.json").unlink(), r"model/config.json is missing"),
    "folder missing": (lambda path: shutil.rmtree(path / "model"), r"model/config.json is missing"),
    "no manifest": (lambda path: (path / MANIFEST).unlink(), r"no MANIFEST.json, so it was not written to its end"),
    "empty manifest": (lambda path: (path / MANIFEST).write_text(""), r"MANIFEST.json is damaged"),
    "manifest cut": (lambda path: os.truncate(path / MANIFEST, 50), r"MANIFEST.json is damaged"),
    "manifest of bytes": (lambda path: (path / MANIFEST).write_bytes(b"\xff\x00"), r"MANIFEST.json is damaged"),
    "manifest a list": (lambda path: (path / MANIFEST).write_text("[]"), r"MANIFEST.json is damaged"),
    "entry wrong": (change_manifest(files={"weights.bin": 3}), r"the entry of weights.bin is 3"),
    "later format": (change_manifest(version=2), r"'lockstep-checkpoint' version 2, and this code reads .* version 1"),
    "other format": (change_manifest(format="other"), r"its format is 'other'"),
}


@pytest.mark.parametrize("kind", TORN)
def test_a_bad_checkpoint_is_named_with_the_reason_and_the_one_before_loads(folder, caplog, kind):
    damage, reason = TORN[kind]
    save(folder, 10, 20)
    damage(folder.path(20))
    with caplog.at_level(logging.WARNING):
        assert folder.newest_good() == folder.path(10)
    assert len(caplog.records) == 1
    caplog.clear()
    with pytest.raises(CheckpointError, match=reason):
        verify(folder.path(20))
    with pytest.raises(CheckpointError, match=rf"resume='.*step-000020' cannot be gone on from: .*{reason}"):
        find_checkpoint(str(folder.path(20)), None)
    damage(folder.path(10))
    with pytest.raises(CheckpointError, match=rf"none of the checkpoints .*is whole.*step-000010: .*{reason}.*resume"):
        folder.newest_good()


def test_a_file_that_cannot_be_read_is_a_reason_too(folder, monkeypatch):
    save(folder, 10)
    monkeypatch.setattr("trainers.checkpoint_manifest._checksum", fail)
    with pytest.raises(CheckpointError, match=r"it cannot be read: .*No space left"):
        verify(folder.path(10))


def test_what_is_to_be_gone_on_from_is_found(folder, tmp_path):
    assert find_checkpoint(None, folder.directory) is None
    assert find_checkpoint("auto", folder.directory) is None  # not even the folder is there
    save(folder, 10, 20)
    (folder.directory / "notes").mkdir()
    assert find_checkpoint("auto", folder.directory) == folder.path(20)
    assert find_checkpoint(str(folder.path(10)), tmp_path) == folder.path(10)
    with pytest.raises(ValueError, match=r"resume='nowhere' is no directory: name a checkpoint"):
        find_checkpoint("nowhere", folder.directory)
    with pytest.raises(ValueError, match=r"holds checkpoints: name one of them"):
        find_checkpoint(str(folder.directory), None)
    with pytest.raises(CheckpointError, match=r"no MANIFEST.json"):
        find_checkpoint(str(folder.directory / "notes"), None)


def test_checkpoints_of_a_future_that_was_given_up_are_set_aside(folder):
    save(folder, 10, 20)
    assert folder.set_aside_after(20) == []
    assert [path.name for path in folder.set_aside_after(10)] == ["set-aside-step-000020"]
    save(folder, 20)
    folder.set_aside_after(10)
    assert names(folder) == ["set-aside-step-000020", "set-aside-step-000020-2", "step-000010"]
    assert folder.newest_good() == folder.path(10)


# A full disk


def test_too_little_room_is_an_error_before_anything_is_written(folder):
    save(folder, 10)
    with (
        pytest.raises(
            CheckpointError,
            match=r"step 20 cannot be written to .*step-000020: there is not enough room. It needs 9,[0,]* bytes, of "
            r"which [\d,]+ are free. Make room there, keep fewer \(keep_checkpoints=2\).*resume='auto'",
        ),
        folder.writing(20, num_bytes=9 * 10**18),
    ):
        pytest.fail("the block was entered")
    assert names(folder) == ["step-000010"]


@pytest.mark.parametrize("place", ["block", "fsync", "rename"])
def test_a_disk_that_fails_leaves_nothing_and_harms_nothing(folder, monkeypatch, place):
    save(folder, 10, 20)
    place_of_failure = {
        "block": fail,
        "fsync": lambda: monkeypatch.setattr(os, "fsync", fail),
        "rename": lambda: monkeypatch.setattr(Path, "rename", fail),
    }
    with pytest.raises(CheckpointError, match=r"No space left on device. It needs 0 bytes"):
        save_and(folder, 30, place_of_failure[place])
    assert names(folder) == ["step-000010", "step-000020"]
    assert folder.newest_good() == folder.path(20)


FILL = textwrap.dedent("""
    import resource, sys
    from pathlib import Path
    from trainers.checkpoint import CheckpointError, CheckpointFolder
    from trainers.policy import Policy

    directory, model, limit = sys.argv[1:]
    policy = Policy(model, num_threads=1)
    for parameter in policy.model.parameters():
        parameter.grad = parameter.detach().clone()
    policy.optim_step()  # from now on there are moments
    folder = CheckpointFolder(directory + "/checkpoints")

    def save(step, num_bytes):
        with folder.writing(step, num_bytes) as partial:
            policy.save_checkpoint(partial)

    save(10, policy.checkpoint_num_bytes())
    if int(limit):
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(limit), int(limit)))
    for num_bytes in (0, policy.checkpoint_num_bytes()):
        try:
            save(20, num_bytes)
        except CheckpointError as error:
            print(error)
    print(sorted(path.name for path in folder.directory.iterdir()))
    policy.load_checkpoint(folder.newest_good())
    print("loaded", folder.newest_good().name)
""")


def fill(tmp_path: Path, model: Path, mount: list[str], limit: int = 0) -> list[str]:
    """Two attempts at a second checkpoint where there is no room for it, in a process of their own."""
    command = [*mount, sys.executable, "-c", FILL, str(tmp_path), str(model), str(limit)]
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    *errors, listing, loaded = done.stdout.splitlines()
    assert (listing, loaded) == ("['step-000010']", "loaded step-000010")
    return errors


def test_a_file_that_may_not_grow_gives_a_clear_error_and_the_checkpoint_before_loads(tmp_path, tiny_model_dir):
    errors = fill(tmp_path, tiny_model_dir("llama"), [], limit=100_000)
    assert len(errors) == 2
    assert all("the checkpoint of step 20 cannot be written" in error for error in errors)
    assert all("File too large" in error and "bytes, of which" in error for error in errors)


def test_a_full_disk_gives_a_clear_error_and_the_checkpoint_before_loads(tmp_path, tiny_model_dir):
    # room for the first checkpoint, of about 1.2 MB, and half of a second
    mount = ["unshare", "-rm", "sh", "-c", 'mount -t tmpfs -o size=1500k tmpfs "$0" && exec "$@"', str(tmp_path)]
    if subprocess.run([*mount, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no tmpfs may be mounted here")
    while_writing, beforehand = fill(tmp_path, tiny_model_dir("llama"), mount)
    assert "No space left on device" in while_writing
    assert "there is not enough room" in beforehand
