"""Journalling: where a pool's run is written down; carried to all processes that deliver rollouts or switch weights."""

from __future__ import annotations

import os
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine import EngineConfig
from rollout.engine_actor import EngineInfo
from rollout.journal import Journal, JournalHeader

if TYPE_CHECKING:  # it brings torch, which the coordinator seldom needs
    from rollout.weight_archive import WeightArchive


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalPlan:
    """What a pool's owner says of its journal; the rest is known when the first engine is."""

    run_directory: Path
    model_directory: Path
    config: EngineConfig
    seed: int
    keep_weights_every: int | None
    keep_last: int | None

    @classmethod
    def of_run(cls, run_directory: str | Path, model_directory: Path, **options: Any) -> JournalPlan:
        """With an absolute path, since the processes that write have other working directories."""
        path = Path(run_directory).expanduser().resolve()
        return cls(run_directory=path, model_directory=model_directory, **options)

    def begin(self, engine_info: EngineInfo) -> Journalling:
        header = JournalHeader.from_config(
            self.config,
            seed=self.seed,
            kernel_fingerprint=engine_info.kernel_fingerprint,
            weights_checksum=engine_info.weights_checksum,
        )
        return Journalling(
            run_directory=self.run_directory,
            header=header,
            model_directory=self.model_directory,
            keep_weights_every=self.keep_weights_every,
            keep_last=self.keep_last,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Journalling:
    """Picklable; each process opens what it needs."""

    run_directory: Path
    header: JournalHeader
    model_directory: Path
    keep_weights_every: int | None  # versions that it divides are kept; None keeps none
    keep_last: int | None  # of those, the latest so many; None is all

    def open_journal(self) -> Journal:
        """A writer of this process's own."""
        name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:4]}"
        return Journal(self.run_directory, self.header, writer_id=name[-64:].lstrip(".-"))

    def open_archive(self) -> WeightArchive | None:
        from rollout.weight_archive import WeightArchive

        if self.keep_weights_every is None:
            return None
        return WeightArchive(
            self.run_directory,
            self.model_directory,
            keep_weights_every=self.keep_weights_every,
            keep_last=self.keep_last,
        )
