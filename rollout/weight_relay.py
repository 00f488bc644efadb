"""RelayGroup: broadcasts bytes between the weight stores of several nodes by gloo.

Weight stores alone are members. Trainers and engines are not, so that one of them may die in mid-transfer and take
nobody along; a store that dies makes the others' transfer fail, and no process but theirs takes part in it.
"""

from __future__ import annotations

import socket
from datetime import timedelta

import numpy as np
import ray
import torch
import torch.distributed as dist

ROOT = 0  # the rank that sends


class RelayError(RuntimeError):
    """A broadcast between nodes did not arrive; its group is of no further use."""


class NoGroupError(RelayError):
    """A store that was to take part in a broadcast is in no group: it was restarted, or its last transfer failed."""


class RelayGroup:
    """One rank of a group of its own, apart from torch's default group. Blocks until all ranks are there.

    With CUDA tensors on both ends, ProcessGroupNCCL would take the place of ProcessGroupGloo here.
    Raises RelayError if they are not there within `timeout` seconds.
    """

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: float) -> None:
        self._is_root = rank == ROOT
        self._timeout = timedelta(seconds=timeout)
        # gloo would look the machine's name up, which need not lead to an address that other nodes reach
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=node_ip())]
        options._timeout = self._timeout
        try:
            self._group = dist.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise RelayError(f"rank {rank} of {size} could not join the relay group: {error}") from error

    def broadcast(self, memory: np.ndarray) -> None:
        """Fills `memory` (bytes) with the root's; every rank calls it with as many. Raises RelayError."""
        try:
            self._group.broadcast(torch.from_numpy(memory), ROOT, self._timeout).wait()
        except RuntimeError as error:
            raise RelayError(f"the {'sending' if self._is_root else 'receiving'} end failed: {error}") from error


def open_rendezvous(size: int, timeout: float) -> dist.TCPStore:
    """Where the ranks of a new group meet; at the root, on a port that the system chooses.

    It listens on the node's address in the cluster alone: torch by itself would listen on all that the machine has.
    """
    listener = socket.create_server((node_ip(), 0))
    host, port = listener.getsockname()[:2]
    return dist.TCPStore(
        host, port, size, is_master=True, timeout=timedelta(seconds=timeout), wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )  # fmt: skip


def join_rendezvous(host: str, port: int, size: int, timeout: float) -> dist.TCPStore:
    """The same, from another node."""
    return dist.TCPStore(host, port, size, is_master=False, timeout=timedelta(seconds=timeout), wait_for_workers=False)


def node_ip() -> str:
    """The address by which other nodes of the Ray cluster know this one."""
    return ray.util.get_node_ip_address()
