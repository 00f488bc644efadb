"""Failures of engines, named by engine, with the remote cause attached."""

from __future__ import annotations

from ray.exceptions import RayActorError, RayTaskError


class EngineError(RuntimeError):
    """An engine (or the pool's coordinator) died or broke; nothing the caller can pass differently would help."""


def translate(who: str, error: BaseException) -> Exception:
    """The exception to raise in the caller's process for a remote `error` of `who` ("engine 1").

    ValueError (the caller's mistake) stays ValueError; everything else becomes an EngineError that names `who`.
    """
    if isinstance(error, RayTaskError) and isinstance(error.cause, ValueError):
        return ValueError(str(error.cause))
    if isinstance(error, RayTaskError):
        return EngineError(f"{who} failed: {type(error.cause).__name__}: {error.cause}")
    if isinstance(error, RayActorError):
        return EngineError(f"{who} died: {error}")
    return EngineError(f"{who} cannot be reached: {type(error).__name__}: {error}")
