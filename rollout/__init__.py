"""Rollout service: Ray actors that each step one deterministic engine, behind one pool."""

from __future__ import annotations

import importlib

_HOMES = {
    "RolloutPool": "rollout.pool",
    "PoolHandle": "rollout.handle",
    "Buffered": "rollout.buffer",
    "Rollout": "rollout.rollout",
    "EpisodeRunner": "rollout.episodes",
    "Environment": "rollout.environment",
    "Observation": "rollout.environment",
    "Turn": "rollout.environment",
    "SyncReport": "rollout.sync_report",
    "EngineError": "rollout.errors",
    "PoolDrainingError": "rollout.errors",
    "draining_on_sigterm": "rollout.draining",
    "JournalError": "rollout.journal",
    "PoolStats": "rollout.coordinator",
    "EngineConfig": "engine",
    "SamplingParams": "engine",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Finds a public name in its module (PEP 562), so that a light actor does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'rollout' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
