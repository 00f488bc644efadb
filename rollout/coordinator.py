"""PoolCoordinator: the small Ray actor that holds what all handles of a pool share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray

from rollout.errors import translate
from rollout.router import Assignment, Router
from rollout.sync_report import CommitReport, SyncMode


@ray.remote(num_cpus=0)
class PoolCoordinator:
    """Routes groups, knows the policy version, and switches all engines to a staged one, one switch at a time."""

    def __init__(self, engines: Sequence[Any]) -> None:
        self._engines = list(engines)
        self._router = Router(len(self._engines))
        self._policy_version = 0  # what engines start with
        self._switching = asyncio.Lock()

    async def assign(self, groups: Sequence[tuple[str | None, int]]) -> list[Assignment]:
        return self._router.assign(groups)

    async def release(self, group_ids: Sequence[str]) -> None:
        self._router.release(group_ids)

    async def locate(self, group_ids: Sequence[str]) -> dict[int, list[str]]:
        return self._router.locate(group_ids)

    async def policy_version(self) -> int:
        return self._policy_version

    async def check_policy_version(self, policy_version: int) -> None:
        """ValueError unless it comes after the current one."""
        if policy_version <= self._policy_version:
            raise ValueError(
                f"policy_version={policy_version} must be greater than the engines' {self._policy_version}: "
                "every sync needs a new version"
            )

    async def commit(self, sync_id: str, policy_version: int, mode: SyncMode) -> list[CommitReport | Exception]:
        """Switches every engine to the weights staged under `sync_id`; each engine's report, or what it raised.

        Runs here, not at the caller, so that a caller which dies half way cannot leave some engines behind.
        """
        async with self._switching:
            await self.check_policy_version(policy_version)
            commits = [engine.commit_weights.remote(sync_id, policy_version, mode) for engine in self._engines]
            reports = await asyncio.gather(*commits, return_exceptions=True)
            if any(isinstance(report, CommitReport) for report in reports):
                self._policy_version = policy_version
            return [
                report if isinstance(report, CommitReport) else translate(f"engine {i}", report)
                for i, report in enumerate(reports)
            ]
