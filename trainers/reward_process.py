"""Reward process: what runs in each process of RewardWorkers - it loads the functions once and answers calls."""

from __future__ import annotations

import asyncio
import ctypes
import os
import pickle
import signal
import sys
import traceback
from multiprocessing.connection import Connection
from typing import Any

from trainers.reward_calls import Answer, ask

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def serve(descriptor: int) -> None:
    """Answers calls from the socket `descriptor` until it is closed.

    First come the pickled functions, which are answered with "" or the traceback of why they can't be loaded, then
    requests (calls, timeout), each answered with a list of Answer.
    """
    _die_with_the_thread_that_started_this()
    os.set_inheritable(descriptor, False)  # programs that a reward starts must not hold it open
    connection = Connection(descriptor)
    try:
        functions = connection.recv()
    except EOFError:
        return
    except Exception:
        connection.send(traceback.format_exc())
        return
    connection.send("")
    with asyncio.Runner() as runner:  # one loop for all calls: what a function keeps (an HTTP session) stays usable
        while (request := _received(connection)) is not None:
            connection.send(_answers(functions, request, runner))


def _received(connection: Connection) -> bytes | None:
    try:
        return connection.recv_bytes()
    except EOFError:  # the parent is done
        return None


def _answers(functions: list[Any], request: bytes, runner: asyncio.Runner) -> list[Answer] | str:
    """The answers, or the traceback of why the request can't be read (a column of a class that isn't there)."""
    try:
        calls, timeout = pickle.loads(request)  # noqa: S301 - from the process that started this one
    except Exception:
        return traceback.format_exc()
    return ask(functions, calls, timeout, runner.run)


def _die_with_the_thread_that_started_this() -> None:
    """A call that hangs never learns that its parent was killed; on Linux the kernel then ends it."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
