"""Weight archive: keeps the weights of some versions of a run, so that what they drew can be drawn again."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from safetensors import SafetensorError

from engine.checkpoint import save_pretrained
from engine.model import NamedTensors
from engine.model_config import read_config_dict
from engine.tokenizer import load_tokenizer
from rollout.journal import JournalError

WEIGHTS_FOLDER = "weights"
_VERSION_FOLDER = re.compile(r"v(\d{6,})", re.ASCII)


class WeightArchive:
    """Saves versions as `run_directory`/weights/vNNNNNN, each a model directory of its own with config and tokenizer.

    keep_weights_every: k keeps every version that k divides. keep_last: of the versions kept, only so many of the
    highest (and always the one just saved) stay; None is all. Version 0 needs no copy: the model's directory has it.

    Raises ValueError for a number below 1.
    """

    def __init__(
        self,
        run_directory: str | Path,
        model_directory: str | Path,
        *,
        keep_weights_every: int = 1,
        keep_last: int | None = None,
    ) -> None:
        for name, number in (("keep_weights_every", keep_weights_every), ("keep_last", keep_last)):
            if number is not None and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        self._folder = Path(run_directory).resolve() / WEIGHTS_FOLDER
        self._config = read_config_dict(model_directory)
        self._tokenizer = load_tokenizer(model_directory)
        self._every = keep_weights_every
        self._keep_last = keep_last

    def wants(self, policy_version: int) -> bool:
        """Whether `save` would keep this version."""
        return policy_version > 0 and policy_version % self._every == 0

    def save(self, policy_version: int, named_tensors: NamedTensors) -> Path | None:
        """The directory that holds the version now, or None for a version that is not kept.

        It appears complete or not at all. An older one of the same number (after a rollback) is replaced. Of an
        iterator, one shard of 5 GB is held in memory at a time; nothing is read of what is not kept.

        Raises JournalError where the weights cannot be written, such as on a full disk; nothing is left of them then.
        """
        if not self.wants(policy_version):
            return None
        path = self._folder / f"v{policy_version:06d}"
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._remove(path)
            save_pretrained(path, self._config, named_tensors, self._tokenizer)
            self._drop_old(policy_version)
        except (OSError, SafetensorError) as error:
            raise JournalError(
                f"the weights of version {policy_version} cannot be kept in {path}: {error}. Make room, or keep fewer: "
                f"raise keep_weights_every={self._every} or lower keep_last={self._keep_last}"
            ) from error
        return path

    def retained(self) -> dict[int, Path]:
        """Where each version that is kept lies, in ascending order."""
        return retained_weights(self._folder)

    def _drop_old(self, saved_version: int) -> None:
        if self._keep_last is None:
            return
        others = [path for version, path in self.retained().items() if version != saved_version]
        for path in others[: max(0, len(others) + 1 - self._keep_last)]:
            self._remove(path)

    def _remove(self, path: Path) -> None:
        """Takes the name away first, so that no half removed version is ever found; also what a killed save left."""
        for left_over in self._folder.glob(f".{path.name}-*"):
            shutil.rmtree(left_over)
        if path.exists():
            gone = path.with_name(f".{path.name}-gone")
            path.rename(gone)
            shutil.rmtree(gone)


def retained_weights(folder: Path) -> dict[int, Path]:
    """The versions in a folder of an archive, in ascending order."""
    if not folder.is_dir():
        return {}
    matches = ((_VERSION_FOLDER.fullmatch(path.name), path) for path in folder.iterdir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))
