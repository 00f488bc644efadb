"""Journal: writes down every delivered group and every change of weights, so that a run can be drawn again."""

from __future__ import annotations

import contextlib
import os
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rollout.journal_format import (
    JournalError,
    JournalHeader,
    JournalledGroup,
    Record,
    VersionSwitch,
    group_line,
    header_line,
    parse_record,
    switch_line,
)
from rollout.rollout import Rollout

__all__ = ["Journal", "JournalError", "JournalFile", "JournalHeader", "RunJournal", "read_journal"]

MAX_FILE_BYTES = 64 * 2**20
JOURNAL_FOLDER = "journal"
_WRITER_ID = re.compile(r"[\w][\w.-]{0,63}", re.ASCII)
_FILE_NAME = re.compile(r"(?P<writer>.+)-(?P<number>\d{6,})\.jsonl", re.ASCII)


class Journal:
    """One writer's part of a run's journal: `directory`/journal/WRITER-NNNNNN.jsonl.

    Any number of writers, in any processes, may share a run directory: every writer has its own files, and none ever
    goes on in a file that is already there. A record reaches the operating system in one write before the call returns,
    and the disk at version switches and at the end; it is never left half written. Threads may share a Journal.

    After a failed write (a full disk) the journal is whole up to the record before, and refuses all further ones.

    Raises:
        ValueError: for a writer_id that is no plain name, a max_file_bytes below 1, or a call after `close`.
        JournalError: if a file cannot be made or written.
    """

    def __init__(
        self, directory: str | Path, header: JournalHeader, writer_id: str, max_file_bytes: int = MAX_FILE_BYTES
    ) -> None:
        if not _WRITER_ID.fullmatch(writer_id):
            raise ValueError(f"writer_id={writer_id!r} must be up to 64 letters, digits, '_', '.' or '-'")
        if max_file_bytes < 1:
            raise ValueError(f"max_file_bytes={max_file_bytes} must be at least 1")
        self.run_directory = Path(directory).resolve()
        self._folder = self.run_directory / JOURNAL_FOLDER
        self._header = header
        self._writer_id = writer_id
        self._max_file_bytes = max_file_bytes
        self._lock = threading.Lock()
        self._failure: str | None = None
        self._fd: int | None = None
        self._start = 0  # where the open file's header ends
        self.path = self._folder  # of the open file
        with self._failing_for_good():
            _make_private(self._folder)
            self._open_next_file()

    def write_group(self, rollouts: Sequence[Rollout]) -> None:
        """Records the samples of one group as they are delivered."""
        if not rollouts:
            raise ValueError("rollouts is empty: a group has at least one sample")
        if len({rollout.group_id for rollout in rollouts}) > 1:
            raise ValueError(f"rollouts are of groups {sorted({r.group_id for r in rollouts})}: write one at a time")
        foreign = {rollout.kernel_fingerprint for rollout in rollouts} - {self._header.kernel_fingerprint}
        assert not foreign, f"the header says fingerprint {self._header.kernel_fingerprint}, rollouts {foreign}"
        self._append(group_line(rollouts))

    def write_switch(
        self, policy_version: int, checksum: str, mode: str, weights_path: str | Path | None = None
    ) -> None:
        """Records a change of weights, on disk when it returns.

        checksum: hex, as in `SyncReport`. weights_path: where `WeightArchive` kept them, None where it did not.
        """
        switch = VersionSwitch(
            policy_version=policy_version,
            checksum=checksum,
            mode=mode,
            weights_path=None if weights_path is None else self._relative(Path(weights_path)),
        )
        self._append(switch_line(switch), is_durable=True)

    def close(self) -> None:
        """Brings everything to the disk. A second call does nothing, nor does one after a failure."""
        with self._lock, self._failing_for_good():
            self._close_file()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _append(self, line: bytes, is_durable: bool = False) -> None:
        with self._lock:
            self._check_open()
            with self._failing_for_good():
                if _size(self._fd) > self._start and _size(self._fd) + len(line) > self._max_file_bytes:
                    self._close_file()
                    self._open_next_file()
                self._write(line)
                if is_durable:
                    os.fsync(self._fd)

    def _check_open(self) -> None:
        if self._failure is not None:
            raise JournalError(f"nothing more is journalled since an earlier failure: {self._failure}")
        if self._fd is None:
            raise ValueError(f"the journal {self._folder} is closed")

    def _write(self, line: bytes) -> None:
        """Appends the whole line or, whatever goes wrong, nothing of it."""
        end = _size(self._fd)
        try:
            rest = memoryview(line)
            while rest:  # a write that the disk has room for a part of returns short, and only the next one says why
                rest = rest[os.write(self._fd, rest) :]
        except BaseException:
            with contextlib.suppress(OSError):  # readers drop a torn tail too
                os.ftruncate(self._fd, end)
            raise

    def _open_next_file(self) -> None:
        numbers = [number for writer, number, _ in _journal_files(self._folder) if writer == self._writer_id]
        number = max(numbers, default=0) + 1
        while self._fd is None:
            self.path = self._folder / f"{self._writer_id}-{number:06d}.jsonl"
            # somebody with the same id may have taken the name in between: his file is his
            with contextlib.suppress(FileExistsError):
                self._fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o600)
            number += 1
        try:
            self._write(header_line(self._header, self._writer_id))
        except OSError:
            self.path.unlink()  # nothing is in it
            raise
        self._start = _size(self._fd)
        _sync_folder(self._folder)

    def _close_file(self) -> None:
        if self._fd is not None:
            fd, self._fd = self._fd, None
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    @contextlib.contextmanager
    def _failing_for_good(self) -> Iterator[None]:
        """Turns an error of the system into a JournalError, after which nothing is written."""
        try:
            yield
        except OSError as error:
            with contextlib.suppress(OSError):
                self._close_file()
            self._failure = (
                f"{self.path} cannot be written: {error.strerror} (errno {error.errno}). What was journalled before is "
                "whole. Make room or choose another run directory, and start anew: a new Journal begins a new file"
            )
            raise JournalError(self._failure) from error

    def _relative(self, path: Path) -> str:
        path = path.resolve()
        return str(path.relative_to(self.run_directory) if path.is_relative_to(self.run_directory) else path)


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalFile:
    """One file of a journal, read through once; its groups are read again when they are asked for."""

    path: Path
    header: JournalHeader
    switches: tuple[VersionSwitch, ...]
    num_groups: int
    policy_versions: frozenset[int]  # that its tokens were drawn under
    num_bytes: int  # of whole records
    num_torn_bytes: int  # behind them, of a record that was not written to its end

    def groups(self) -> Iterator[JournalledGroup]:
        for _, record in _records(self.path, self.num_bytes):
            if isinstance(record, JournalledGroup):
                yield record


@dataclass(frozen=True, slots=True, kw_only=True)
class RunJournal:
    """All that the writers of one run have written."""

    run_directory: Path
    files: tuple[JournalFile, ...]  # by writer, then in the order of writing
    torn_files: tuple[Path, ...]  # that hold not even a whole header, and so nothing

    def switches(self) -> list[VersionSwitch]:
        return [switch for file in self.files for switch in file.switches]


def read_journal(directory: str | Path) -> RunJournal:
    """Reads a run's journal; it may still be written to. What is left of a torn last record is dropped and counted.

    Raises:
        ValueError: where there is no such directory, or no journal in it.
        JournalError: naming file and line, for a damaged record before the last one or a format that is too new.
    """
    run_directory = Path(directory).expanduser().resolve()
    if not run_directory.is_dir():
        raise ValueError(f"{run_directory} is no directory: give the run directory that the journal was written to")
    paths = [path for _, _, path in _journal_files(run_directory / JOURNAL_FOLDER)]
    if not paths:
        raise ValueError(f"{run_directory} holds no journal: {JOURNAL_FOLDER}/*.jsonl is missing")
    files = {path: _scan(path) for path in paths}
    return RunJournal(
        run_directory=run_directory,
        files=tuple(file for file in files.values() if file is not None),
        torn_files=tuple(path for path, file in files.items() if file is None),
    )


def _journal_files(folder: Path) -> list[tuple[str, int, Path]]:
    """(writer, number, path), sorted."""
    if not folder.is_dir():
        return []
    matches = ((_FILE_NAME.fullmatch(path.name), path) for path in folder.iterdir())
    return sorted((match["writer"], int(match["number"]), path) for match, path in matches if match)


def _scan(path: Path) -> JournalFile | None:
    """None for a file whose first record is torn."""
    size, end = path.stat().st_size, 0
    header, switches, num_groups, versions = None, [], 0, set()
    for end, record in _records(path, size):  # noqa: B007  (where the last whole record ends)
        if isinstance(record, JournalHeader):
            header = record
        elif header is None:
            raise JournalError(f"{path} does not begin with a header: it is no journal, or its first line was removed")
        elif isinstance(record, VersionSwitch):
            switches.append(record)
        else:
            num_groups += 1
            versions.update(version for sample in record.samples for version in sample.policy_versions)
    if header is None:
        return None
    return JournalFile(
        path=path,
        header=header,
        switches=tuple(switches),
        num_groups=num_groups,
        policy_versions=frozenset(versions),
        num_bytes=end,
        num_torn_bytes=size - end,
    )


def _records(path: Path, size: int) -> Iterator[tuple[int, Record]]:
    """(where it ends, record) of each whole line within the first `size` bytes, short of a torn last one."""
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            is_last = end + len(line) >= size
            if is_last and not line.endswith(b"\n"):
                return
            try:
                record = parse_record(line)
            except ValueError as error:
                if is_last and number > 1:  # what a crash of the machine leaves in place of a line
                    return
                raise JournalError(f"{path}, line {number}: {error}") from error
            end += len(line)
            yield end, record
            if is_last:
                return


def _make_private(folder: Path) -> None:
    """The folder, for its owner alone; parents that are missing are made so too."""
    if not folder.parent.is_dir():
        _make_private(folder.parent)
    folder.mkdir(mode=0o700, exist_ok=True)
    folder.chmod(0o700)


def _sync_folder(folder: Path) -> None:
    """Brings the names of new files to the disk."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def _size(fd: int) -> int:
    return os.fstat(fd).st_size
