"""Run checkpoints: where a run begins or goes on, and when and what it saves on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainers.checkpoint import CheckpointError, CheckpointFolder, find_checkpoint
from trainers.loop_config import LoopConfig
from trainers.run_state import RunState, check_settings, run_settings
from trainers.untrained_groups import UNTRAINED_GROUPS, UntrainedGroup, read_groups, write_groups

SavePart = Callable[[str], Mapping[str, Any]]
"""(directory) -> facts for state.json. It writes its files there, on this machine or one that shares the directory."""
LoadPart = Callable[[str, Mapping[str, Any]], Any]
"""(directory, the facts that were saved)."""

logger = logging.getLogger(__name__)


class RunCheckpoints:
    """The checkpoints of one run.

    A checkpoint is made of named parts, each written and read by whoever holds the tensors: "policy" is the trainer
    actor's, or that of all its ranks together; others come beside it, with files of their own names. Tensors never pass
    through here.

    rows: the data set, in its order. settings: what else the run's bits depend on, by name; it must be the same after a
    resume.
    Raises ValueError for a resume under other settings, CheckpointError for a checkpoint that is not whole.
    """

    def __init__(
        self, config: LoopConfig, rows: Sequence[Mapping[str, Any]], settings: Mapping[str, Any] | None = None
    ) -> None:
        directory = config.checkpoint_dir
        self.config = config
        self.folder = None if directory is None else CheckpointFolder(directory, config.keep_checkpoints)
        self.resumed = find_checkpoint(config.resume, directory)
        self.settings: dict[str, Any] = {}
        self.start = RunState(step=0, prompt_position=0)
        if self.resumed is not None:
            self.start = RunState.read(self.resumed)
        if self.resumed is not None or config.checkpoint_every:
            self.require(run_settings(config, rows, settings or {}))

    def require(self, settings: Mapping[str, Any]) -> None:
        """Adds settings that are known only now; ValueError where those of the checkpoint gone on from are others."""
        if self.resumed is not None:
            check_settings(self.resumed, self.start.settings, settings, type(self.config))
        self.settings |= settings

    def load(self, parts: Mapping[str, LoadPart]) -> list[UntrainedGroup]:
        """Gives every part what it saved; returns the groups that were drawn or asked for and not trained on.

        From here on the run's own checkpoints follow: those of later steps are set aside. A run from the start loads
        nothing. Raises CheckpointError for a checkpoint that has other parts.
        """
        groups = [] if self.resumed is None else self._load(self.resumed, parts)
        if self.folder is not None and (self.resumed is not None or self.config.checkpoint_every):
            is_own = self.resumed is not None and self.resumed.parent == self.folder.directory
            self.folder.set_aside_after(self.start.step if is_own else 0)
        return groups

    def is_due(self, step: int) -> bool:
        every = self.config.checkpoint_every
        return every > 0 and (step % every == 0 or step == self.config.num_steps)

    def save(
        self,
        *,
        step: int,
        prompt_position: int,
        parts: Mapping[str, SavePart],
        groups: Sequence[UntrainedGroup] = (),
        num_bytes: int = 0,
    ) -> Path:
        """A complete checkpoint of a step that is done; then those too many are removed.

        prompt_position: PromptOrder's. groups: drawn or asked for, and not trained on. num_bytes: about what the parts
        write.
        Raises CheckpointError where the disk does not take it; all checkpoints before stay as they are.
        """
        assert self.folder is not None, "is_due says no without a checkpoint_dir"
        began = time.perf_counter()
        with self.folder.writing(step, num_bytes) as directory:
            facts = {name: dict(save_part(str(directory))) for name, save_part in parts.items()}
            if not any(directory.iterdir()):
                raise OSError("what the trainer wrote is not to be seen here: it runs on a machine without this disk")
            if groups:
                write_groups(directory / UNTRAINED_GROUPS, groups)
            RunState(step=step, prompt_position=prompt_position, settings=self.settings, parts=facts).write(directory)
        logger.info("checkpoint of step %d written in %.1f s", step, time.perf_counter() - began)
        return self.folder.path(step)

    def _load(self, checkpoint: Path, parts: Mapping[str, LoadPart]) -> list[UntrainedGroup]:
        if self.start.parts.keys() != parts.keys():
            raise CheckpointError(
                f"{checkpoint} has the parts {sorted(self.start.parts)}, and this run needs {sorted(parts)}: go on "
                "with the trainer that wrote it"
            )
        for name, load_part in parts.items():
            load_part(str(checkpoint), self.start.parts[name])
        logger.info("going on from %s, after step %d", checkpoint, self.start.step)
        groups = checkpoint / UNTRAINED_GROUPS
        return read_groups(groups) if groups.exists() else []
