"""SharedSegment: memory without a name that the processes of one node map, as long as its holder keeps it open.

A memfd has no entry in /dev/shm: the size limit of that folder (64 MB in many containers) does not hold for it, and
when its holder and all who mapped it are gone, however they ended, so is the memory.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import functools
import mmap
import os
import threading
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_MADV_HUGEPAGE, _MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 14, 22, 23  # Linux; advice that may be refused


class SegmentUnreachableError(RuntimeError):
    """A segment cannot be mapped here: its holder is gone, or is of another node, user or container."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentAddress:
    """Where a process of the same node finds a segment."""

    node_id: str
    pid: int  # of the holder
    fd: int  # in the holder
    inode: int  # tells the segment from a later one under the same pid and fd
    num_bytes: int

    @property
    def path(self) -> str:
        return f"/proc/{self.pid}/fd/{self.fd}"


def create_segment(node_id: str, num_bytes: int) -> SegmentAddress:
    """A segment of zeros held by this process until `close_segment`; a page takes memory when it is first written.

    Raises MemoryError if the machine has less memory than that.
    """
    available = _available_memory()
    if num_bytes > available:
        raise MemoryError(
            f"weights take {num_bytes / 2**20:.0f} MiB of shared memory and node {node_id[:8]} has "
            f"{available / 2**20:.0f} MiB left: use a machine with more, or weight_transport='object_store', which can "
            "spill to disk"
        )
    fd = os.memfd_create("lockstep-weights", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, num_bytes)
    # nobody can shrink it under a reader, who would die of SIGBUS
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return SegmentAddress(node_id=node_id, pid=os.getpid(), fd=fd, inode=os.fstat(fd).st_ino, num_bytes=num_bytes)


def close_segment(address: SegmentAddress) -> None:
    """By the holder: nobody can map it any more; whoever has mapped it keeps the memory until they let go."""
    assert address.pid == os.getpid(), f"segment of process {address.pid} closed by {os.getpid()}"
    os.close(address.fd)


def map_segment(address: SegmentAddress, is_writable: bool = False) -> np.ndarray:
    """The segment's bytes, read-only unless asked otherwise; mapped once and kept for the next syncs.

    Raises SegmentUnreachableError.
    """
    return _mapped_segments().map(address, is_writable)


class _MappedSegments:
    """What this process has mapped. It lets go of segments that their holders have closed when it maps another."""

    def __init__(self) -> None:
        self._memory: dict[tuple[SegmentAddress, bool], np.ndarray] = {}
        self._lock = threading.Lock()

    def map(self, address: SegmentAddress, is_writable: bool) -> np.ndarray:
        with self._lock:
            key = (address, is_writable)
            if key not in self._memory:
                self._memory = {known: memory for known, memory in self._memory.items() if _is_open(known[0])}
                self._memory[key] = _map(address, is_writable)
            return self._memory[key]


@functools.cache
def _mapped_segments() -> _MappedSegments:
    return _MappedSegments()


def _is_open(address: SegmentAddress) -> bool:
    try:
        return os.stat(address.path).st_ino == address.inode
    except OSError:
        return False


def _map(address: SegmentAddress, is_writable: bool) -> np.ndarray:
    try:
        fd = os.open(address.path, (os.O_RDWR if is_writable else os.O_RDONLY) | os.O_CLOEXEC)
    except OSError as error:
        raise SegmentUnreachableError(_why_unreachable(address, os.strerror(error.errno))) from error
    try:
        status = os.fstat(fd)
        if (status.st_ino, status.st_size) != (address.inode, address.num_bytes):
            raise SegmentUnreachableError(_why_unreachable(address, "another file is there now"))
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if is_writable else 0)
        memory = mmap.mmap(fd, address.num_bytes, flags=mmap.MAP_SHARED, prot=protection)
    finally:
        os.close(fd)
    _populate(memory, _MADV_POPULATE_WRITE if is_writable else _MADV_POPULATE_READ)
    return np.frombuffer(memory, np.uint8)


def _populate(memory: mmap.mmap, advice: int) -> None:
    """Page faults are taken now, all at once, and not in the middle of the first copies."""
    for advised in (_MADV_HUGEPAGE, advice):
        with contextlib.suppress(OSError):
            memory.madvise(advised)


def _why_unreachable(address: SegmentAddress, reason: str) -> str:
    return (
        f"shared memory of node {address.node_id[:8]} cannot be opened at {address.path} ({reason}): its weight store "
        "has ended, or runs as another user or in another container"
    )


def _available_memory() -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    raise OSError(errno.ENOENT, "no MemAvailable", "/proc/meminfo")
