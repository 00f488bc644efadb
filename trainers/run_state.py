"""Run state: where a run stands beside its tensors, and the settings that a resumed run must share."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from trainers.checkpoint_manifest import CheckpointError, write_json
from trainers.loop_config import LoopConfig

STATE = "state.json"
# Fields of a LoopConfig that change no bit of what is trained: these may be others after a resume, all else may not.
FREE_FIELDS = frozenset({
    "num_engines", "engine_gpus", "trainer_gpus", "num_threads", "reward_processes", "reward_timeout",
    "trainer_timeout", "gradient_checkpointing", "eval_every", "answer_template", "num_eval_samples", "right_reward",
    "check_all_groups", "check_stale_tokens", "output_dir", "journal_dir", "keep_weights_every", "keep_last",
    "checkpoint_dir", "checkpoint_every", "keep_checkpoints", "resume",
})  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RunState:
    """What of a run is no tensor. All random numbers are functions of the seed, the step and the position."""

    step: int  # the last that is done
    prompt_position: int  # rows handed out, see PromptOrder
    settings: Mapping[str, Any] = field(default_factory=dict)  # that a resumed run must share
    parts: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # "policy", ...: what its writer wants back

    @property
    def policy_version(self) -> int:
        """Of the weights, as the trainer's part has it; 0 at the start of a run."""
        return self.parts["policy"]["policy_version"] if self.parts else 0

    def write(self, directory: Path) -> None:
        write_json(directory / STATE, asdict(self))

    @classmethod
    def read(cls, directory: Path) -> RunState:
        """Raises CheckpointError for a state that lacks an entry or has one too many."""
        try:
            return cls(**json.loads((directory / STATE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(f"{directory / STATE} is no state of a run: {error}") from error


def run_settings(config: LoopConfig, rows: Sequence[Mapping[str, Any]], extra: Mapping[str, Any]) -> dict[str, Any]:
    """All that decides about the bits of a run and is known before it starts, as JSON has it.

    extra: what the caller adds, such as the reward's name. A schedule that falls depends on the number of steps too.
    """
    free = FREE_FIELDS | ({"num_steps"} if config.learning_rate_schedule == "constant" else set())
    values = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in free}
    return as_json(
        {
            "config": type(config).__name__,
            **values,
            "num_rows": len(rows),
            "rows_checksum": _rows_checksum(rows),
            **extra,
        }
    )


def check_settings(
    path: Path, saved: Mapping[str, Any], current: Mapping[str, Any], config_class: type[LoopConfig]
) -> None:
    """ValueError names every setting of the checkpoint in `path` that is another one now.

    One that the checkpoint does not know (written by older code) had its default.
    """
    defaults = as_json({f.name: f.default for f in fields(config_class)})
    known = {name: saved.get(name, defaults.get(name)) for name in current}
    different = [name for name in current if current[name] != known[name]]
    if different:
        was = ", ".join(f"{name}={known[name]!r} (now {current[name]!r})" for name in different)
        raise ValueError(
            f"the checkpoint {path} was made with {was}: a run goes on with the settings it began with. Give these, or "
            "begin a new run from the checkpoint's weights (the folder `model` in it is a model's directory)"
        )


def as_json(values: Any) -> Any:
    """Values as they are after a way through JSON (a tuple is a list), so that they compare with saved ones."""
    return json.loads(json.dumps(values, default=str))


def _rows_checksum(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of all that is plain data in the rows; of other objects, whose text may hold an address, the type."""
    digest = hashlib.sha256()
    for row in rows:
        text = json.dumps(dict(row), skipkeys=True, default=lambda value: type(value).__name__)
        digest.update(text.encode() + b"\n")
    return digest.hexdigest()[:32]
