"""Processes: what driver, coordinator, engines and Ray's own daemons take of processors and memory."""

from __future__ import annotations

import os
from typing import Literal

import psutil
import ray

from rollout import RolloutPool

Role = Literal["driver", "coordinator", "engines", "ray"]
ROLES: tuple[Role, ...] = ("driver", "coordinator", "engines", "ray")
DAEMONS = ("gcs_server", "raylet")


class Processes:
    """Of a pool whose Ray was started by this process, as its engines are now."""

    def __init__(self, pool: RolloutPool) -> None:
        coordinator = ray.get(pool.coordinator.__ray_call__.remote(pid_of))
        daemons = [one for one in psutil.Process().children(recursive=True) if one.name() in DAEMONS]
        if not daemons:
            raise ValueError("Ray's daemons are not children of this process: unset RAY_ADDRESS, it starts its own Ray")
        self._processes: dict[Role, list[psutil.Process]] = {
            "driver": [psutil.Process()],
            "coordinator": [psutil.Process(coordinator)],
            "engines": [psutil.Process(info.pid) for info in pool.engine_infos],
            "ray": daemons,
        }

    def cpu_seconds(self) -> dict[Role, float]:
        """User and system time since each of them was started."""
        return {role: sum(map(cpu_seconds, processes)) for role, processes in self._processes.items()}

    def resident_bytes(self, role: Role) -> int:
        """Of all processes of the role together; pages that they share count for each."""
        return sum(process.memory_info().rss for process in self._processes[role])

    def own_bytes(self, role: Role) -> int:
        """What would be free again if one process of the role ended; of the first."""
        return self._processes[role][0].memory_full_info().uss


def cpu_between(before: dict[Role, float], after: dict[Role, float]) -> dict[Role, float]:
    return {role: after[role] - before[role] for role in before}


def cpu_seconds(process: psutil.Process) -> float:
    times = process.cpu_times()
    return times.user + times.system


def pid_of(actor: object) -> int:
    """For `ACTOR.__ray_call__`."""
    return os.getpid()
