"""Checkpoint folder: complete checkpoints by step; one appears whole or not at all, and the last good one stays."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainers.checkpoint_manifest import MANIFEST, CheckpointError, seal, sync, verify

__all__ = ["CheckpointError", "CheckpointFolder", "find_checkpoint"]

_STEP_FOLDER = re.compile(r"step-(\d{6,})", re.ASCII)
_PARTIAL = ".partial-"  # begins the names of what is being written or removed; a killed process may leave one
_SET_ASIDE = "set-aside-"

logger = logging.getLogger(__name__)


class CheckpointFolder:
    """`directory`/step-NNNNNN, one for each checkpoint; one process at a time may write here.

    keep: so many complete checkpoints stay, the newest ones.
    """

    def __init__(self, directory: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"keep={keep} must be at least 1: the newest checkpoint always stays")
        self.directory, self.keep = Path(directory).absolute(), keep

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, good or not, in ascending order."""
        if not self.directory.is_dir():
            return []
        return sorted(
            int(match[1]) for path in self.directory.iterdir() if (match := _STEP_FOLDER.fullmatch(path.name))
        )

    def path(self, step: int) -> Path:
        return self.directory / f"step-{step:06d}"

    def newest_good(self) -> Path | None:
        """The newest checkpoint that is whole, every byte of it read; None where there are none at all.

        Those that are not whole are named in a warning, with the reason. Raises CheckpointError where none is whole.
        """
        reasons = []
        for step in reversed(self.steps()):
            path = self.path(step)
            try:
                verify(path)
            except CheckpointError as error:
                logger.warning("checkpoint %s is passed over: %s", path, error)
                reasons.append(f"{path.name}: {error}")
            else:
                return path
        if reasons:
            raise CheckpointError(
                f"none of the checkpoints in {self.directory} is whole ({'; '.join(reasons)}). Restore one from a "
                "copy, or begin anew with resume=None"
            )
        return None

    @contextmanager
    def writing(self, step: int, num_bytes: int = 0) -> Iterator[Path]:
        """An empty directory to write the checkpoint of a step into; it is complete when the block has ended.

        num_bytes: about what it will take; less room than that is an error before anything is written. An older
        checkpoint of the same step is replaced. If the block or the disk fails, nothing is left of the new one, and
        all others stay as they are.

        Raises CheckpointError in place of every OSError.
        """
        partial = self.directory / f"{_PARTIAL}{self.path(step).name}"
        try:
            self.remove_leftovers()
            partial.mkdir(parents=True)
            self._check_room(num_bytes)
            yield partial
            seal(partial)
            self._publish(partial, self.path(step))
            self._remove_old(step)
        except OSError as error:
            raise CheckpointError(self._explain(step, error, num_bytes)) from error
        finally:
            shutil.rmtree(partial, ignore_errors=True)

    def set_aside_after(self, step: int) -> list[Path]:
        """Renames the checkpoints of later steps, which a run that goes on from `step` would mistake for its own.

        These are torn ones, or a future that was given up. Returns their new paths; nothing here looks at them again.
        """
        return [self._set_aside(self.path(later)) for later in self.steps() if later > step]

    def remove_leftovers(self) -> None:
        """Removes what killed processes left half written or half removed."""
        for path in self.directory.glob(f"{_PARTIAL}*"):
            shutil.rmtree(path)

    def _check_room(self, num_bytes: int) -> None:
        if shutil.disk_usage(self.directory).free < num_bytes:
            raise OSError("there is not enough room")

    def _publish(self, partial: Path, path: Path) -> None:
        if not _is_whole(partial):
            raise OSError("the files do not have the sizes that they were written with")
        if path.exists():
            self._remove(path)
        partial.rename(path)
        sync(self.directory)

    def _remove_old(self, step: int) -> None:
        """Keeps the checkpoint just written and the newest whole ones before it; later ones are another future's."""
        whole = [other for other in self.steps() if other < step and _is_whole(self.path(other))]
        for other in whole[: max(0, len(whole) + 1 - self.keep)]:
            self._remove(self.path(other))

    def _remove(self, path: Path) -> None:
        """Takes the name away first, so that no half removed checkpoint is ever found."""
        gone = path.with_name(f"{_PARTIAL}removed-{path.name}")
        path.rename(gone)
        shutil.rmtree(gone)

    def _set_aside(self, path: Path) -> Path:
        number, target = 1, path.with_name(f"{_SET_ASIDE}{path.name}")
        while target.exists():
            number += 1
            target = path.with_name(f"{_SET_ASIDE}{path.name}-{number}")
        path.rename(target)
        logger.warning("checkpoint %s is later than the step gone on from, and now called %s", path, target.name)
        return target

    def _explain(self, step: int, error: OSError, num_bytes: int) -> str:
        try:
            room = f"It needs {num_bytes:,} bytes, of which {shutil.disk_usage(self.directory).free:,} are free. "
        except OSError:  # not even the directory could be made
            room = ""
        return (
            f"the checkpoint of step {step} cannot be written to {self.path(step)}: {error}. {room}Make room there, "
            f"keep fewer (keep_checkpoints={self.keep}), or name another checkpoint_dir, and go on with resume='auto': "
            "the checkpoints before it are whole"
        )


def find_checkpoint(resume: str | None, directory: str | Path | None) -> Path | None:
    """The verified checkpoint to go on from; None for a run from the start.

    resume: None, "auto" (the newest good one in `directory`, if there are any), or the path of a checkpoint.
    Raises CheckpointError for one that is not whole, ValueError for a path that is none.
    """
    if resume is None:
        return None
    if resume == "auto":
        assert directory is not None, "GRPOConfig refuses resume='auto' without a checkpoint_dir"
        return CheckpointFolder(directory).newest_good()
    path = Path(resume).expanduser().absolute()
    if not path.is_dir():
        raise ValueError(f"resume={resume!r} is no directory: name a checkpoint, such as RUN/checkpoints/step-000020")
    if not (path / MANIFEST).exists() and CheckpointFolder(path).steps():
        raise ValueError(f"resume={resume!r} holds checkpoints: name one of them, or give resume='auto'")
    try:
        verify(path)
    except CheckpointError as error:
        raise CheckpointError(f"resume={resume!r} cannot be gone on from: {error}") from error
    return path


def _is_whole(path: Path) -> bool:
    try:
        verify(path, reads_files=False)
    except CheckpointError:
        return False
    return True
