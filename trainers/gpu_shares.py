"""GPU shares: how much of Ray's GPUs each engine and the trainer of a run reserve, alone or side by side."""

from __future__ import annotations

from dataclasses import dataclass

from engine import EngineConfig
from trainers.loop_config import LoopConfig

RAY_UNITS = 10_000  # Ray counts resources in parts of this size


@dataclass(frozen=True, slots=True, kw_only=True)
class GPUShares:
    """GPUs, or parts of one, as Ray's num_gpus."""

    engine: float  # of each
    trainer: float

    @classmethod
    def from_config(cls, config: LoopConfig, engine_config: EngineConfig) -> GPUShares:
        """What the config says, and where it leaves it open an even share of this machine's GPUs; none on a CPU."""
        even = 0.0
        if engine_config.device_name == "cuda":
            import torch

            even = even_share(num_actors=config.num_engines + 1, num_gpus=torch.cuda.device_count())
        return cls(
            engine=even if config.engine_gpus is None else config.engine_gpus,
            trainer=even if config.trainer_gpus is None else config.trainer_gpus,
        )

    def require_room(self, num_engines: int, num_gpus: float) -> None:
        """Raises ValueError where the cluster has fewer GPUs: Ray would wait for them without a word."""
        needed = num_engines * self.engine + self.trainer
        if needed > num_gpus:
            raise ValueError(
                f"num_engines={num_engines} with engine_gpus={self.engine:g} and the trainer with "
                f"trainer_gpus={self.trainer:g} need {needed:g} GPUs, and the cluster has {num_gpus:g}: lower them "
                "(0.5 each shares a GPU)"
            )


def even_share(num_actors: int, num_gpus: int) -> float:
    """A whole GPU for each actor, or the part of one by which all of them find a place."""
    num_side_by_side = -(-num_actors // num_gpus)
    return 1.0 if num_side_by_side == 1 else RAY_UNITS // num_side_by_side / RAY_UNITS
