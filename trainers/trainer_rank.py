"""Trainer rank: the Ray actor of one of several GRPOActors or PPOActors; its environment is complete before it is one.

Nothing here may import accelerate at the top: it reads RANK, WORLD_SIZE and MASTER_* once.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any

import ray

from engine.computation import Device, Numerics
from rollout import PoolHandle, logs
from trainers.objective_config import ObjectiveConfig
from trainers.ppo_config import PPOConfig

Address = tuple[str, int]


class TrainerRank:
    """One rank; every method is called on all ranks, in the same order, by their TrainerGroup."""

    def __init__(self, rank: int, num_ranks: int) -> None:
        self.rank, self.num_ranks = rank, num_ranks
        self.trainer: Any = None

    def process_id(self) -> int:
        return os.getpid()

    def meeting_place(self) -> Address:
        """This node's address and a port of it that is free now: rank 0's is where the ranks meet."""
        with socket.socket() as listener:
            listener.bind(("", 0))
            return ray.util.get_node_ip_address(), listener.getsockname()[1]

    def start(
        self,
        meeting_place: Address,
        model: str,
        numerics: Numerics,
        config: ObjectiveConfig,
        pool: PoolHandle,
        device: Device,
    ) -> None:
        """Meets the other ranks and loads the model; see GRPOActor and PPOActor."""
        assert "accelerate" not in sys.modules, "accelerate was imported before this rank's environment was complete"
        host, port = meeting_place
        places = {"RANK": self.rank, "WORLD_SIZE": self.num_ranks, "MASTER_ADDR": host, "MASTER_PORT": port}
        # Ray shows each actor its own devices only, so each is the first of its kind
        places |= {"LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 1}
        os.environ.update({name: str(value) for name, value in places.items()})
        logs.configure(pool=pool.pool_name, actor=f"trainer-{self.rank}")
        self.trainer = _actor_class(config)(model, numerics, config, pool, device)

    def call(self, method: str, *arguments: Any) -> Any:
        """A method of this rank's trainer."""
        return getattr(self.trainer, method)(*arguments)


def _actor_class(config: ObjectiveConfig) -> Any:
    if isinstance(config, PPOConfig):
        from trainers.ppo_actor import PPOActor

        return PPOActor
    from trainers.grpo_actor import GRPOActor

    return GRPOActor
