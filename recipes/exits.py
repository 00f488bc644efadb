"""Exits: how a recipe's process ends - done, stopped by a signal, or refused with one clear line."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_INTERRUPTED, EXIT_TERMINATED = 130, 143  # 128 + SIGINT, 128 + SIGTERM, as shells have it


class UserError(ValueError):
    """A mistake of the user's, which a message explains better than a traceback."""


def exit_code(recipe: Callable[[], None]) -> int:
    """Runs a recipe in the main thread; SIGTERM unwinds it as Ctrl-C does. Returns the process's exit code."""
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        recipe()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    except KeyboardInterrupt as interrupt:
        is_sigterm = interrupt.args == (_name(signal.SIGTERM),)
        return _stopped("SIGTERM", EXIT_TERMINATED) if is_sigterm else _stopped("Ctrl-C", EXIT_INTERRUPTED)
    except SystemExit:  # while Ray starts, SIGTERM meets a handler of Ray's own, which exits
        return _stopped("SIGTERM", EXIT_TERMINATED)
    return 0


@contextlib.contextmanager
def user_errors(
    until: Callable[[], bool] = lambda: False, always: type[Exception] | tuple[type[Exception], ...] = ()
) -> Iterator[None]:
    """Inside, a ValueError is the user's to mend; not so once `until` says that the run has got going.

    always: errors that are the user's to mend whenever they come, such as a full disk.
    """
    try:
        yield
    except always as error:
        raise UserError(str(error)) from error
    except ValueError as error:
        if until():
            raise
        raise UserError(str(error)) from error


def _stopped(by: str, code: int) -> int:
    print(f"stopped by {by}", file=sys.stderr)
    return code


def _interrupt(signum: int, frame: Any) -> NoReturn:
    raise KeyboardInterrupt(_name(signum))


def _name(signum: int) -> str:
    return f"signal {int(signum)}"
