"""Failures of engines, named by engine, with the remote cause attached."""

from __future__ import annotations

from typing import Literal

from ray.exceptions import RayActorError, RayTaskError

from rollout.journal_format import JournalError


class EngineError(RuntimeError):
    """An engine (or the pool's coordinator) died or broke; nothing the caller can pass differently would help."""


class PoolDrainingError(EngineError):
    """The pool was told to drain (`PoolHandle.drain`), so it takes no new groups."""


class EngineUnplacedError(EngineError):
    """Ray found no node with room for an engine in time."""


class EngineStoppedError(RuntimeError):
    """An engine's loop no longer steps it; the cause says why."""


class EngineRetiredError(EngineStoppedError):
    """The loop was told to stop: its groups go on elsewhere."""


Loss = Literal["died", "failed", "retired"]


def loss_of(error: BaseException) -> Loss:
    """How an engine was lost (see `is_loss`): its process ended, its own code raised, or it was told to stop."""
    if not isinstance(error, RayTaskError):
        return "died"
    return "retired" if isinstance(error.cause, EngineRetiredError) else "failed"


def is_loss(error: BaseException) -> bool:
    """Whether a remote call failed because its engine is gone, and not because of what was asked."""
    return not isinstance(error, RayTaskError) or isinstance(error.cause, EngineStoppedError)


def translate(who: str, error: BaseException) -> Exception:
    """The exception to raise in the caller's process for a remote `error` of `who` ("engine 1").

    ValueError (the caller's mistake), JournalError and PoolDrainingError stay what they are, an EngineError keeps the
    name it has; everything else becomes an EngineError that names `who`.
    """
    if isinstance(error, EngineError):
        return error
    cause = error.cause if isinstance(error, RayTaskError) else error
    for kind in (ValueError, PoolDrainingError, EngineError, JournalError):
        if isinstance(cause, kind):
            return kind(str(cause))
    if isinstance(error, RayTaskError):
        return EngineError(f"{who} failed: {type(cause).__name__}: {cause}")
    if isinstance(error, RayActorError):
        return EngineError(f"{who} died: {error}")
    return EngineError(f"{who} cannot be reached: {type(error).__name__}: {error}")
