"""SyncReport: what a weight sync did, from every engine's acknowledgement of it."""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.outputs import UpdateMode
from rollout.requests import Partials

SyncMode = UpdateMode
"""What becomes of running requests; see `PoolHandle.sync_weights`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CommitReport:
    """One engine's acknowledgement of a version."""

    policy_version: int
    checksum: bytes  # of the weights as it holds them
    pause_seconds: float  # how long no step could run
    num_recomputed_tokens: int  # tokens whose KV running requests gave up
    partials: Partials = field(default_factory=dict, repr=False)  # drawn so far, for groups that nobody has collected


@dataclass(frozen=True, slots=True, kw_only=True)
class SyncReport:
    """What one weight sync did, engine by engine."""

    policy_version: int
    seconds: float  # from the first tensor read to the last acknowledgement
    bytes: int  # float32 bytes of one copy of the weights
    pause_seconds: tuple[float, ...]  # per engine: how long no step could run
    policy_versions: tuple[int, ...]  # per engine: the version it acknowledged
    checksum: str  # hex, of the weights as they were sent
    is_lockstep: bool  # every engine acknowledged this version, with this checksum
    num_recomputed_tokens: int  # tokens whose KV running requests gave up, over all engines

    @classmethod
    def from_commits(
        cls, *, policy_version: int, seconds: float, num_bytes: int, checksum: bytes, commits: list[CommitReport]
    ) -> SyncReport:
        """Joins the engines' acknowledgements, in engine order, with what the sender knows."""
        versions = tuple(commit.policy_version for commit in commits)
        return cls(
            policy_version=policy_version,
            seconds=seconds,
            bytes=num_bytes,
            pause_seconds=tuple(commit.pause_seconds for commit in commits),
            policy_versions=versions,
            checksum=checksum.hex(),
            is_lockstep=set(versions) == {policy_version} and {commit.checksum for commit in commits} == {checksum},
            num_recomputed_tokens=sum(commit.num_recomputed_tokens for commit in commits),
        )
