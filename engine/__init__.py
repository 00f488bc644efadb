"""A deterministic, V1-style inference engine: one process, one device, no Ray."""

from __future__ import annotations

import importlib

_HOMES = {
    "LLMEngine": "engine.llm_engine",
    "EngineConfig": "engine.config",
    "SamplingParams": "engine.sampling_params",
    "Completion": "engine.outputs",
    "StepOutput": "engine.outputs",
    "EngineStats": "engine.outputs",
    "WeightUpdate": "engine.outputs",
    "RequestTiming": "engine.timing",
    "MemoryPlan": "engine.memory_plan",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str):
    """Finds a public name in its module (PEP 562), so that reading a config does not import torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'engine' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
