"""MathVerifier: grades mathematical answers in a child process, which a deadline can end."""

from __future__ import annotations

import logging
import multiprocessing
import signal
from multiprocessing.connection import Connection

START_SECONDS = 60.0  # the child imports sympy first; that isn't charged to an answer


class MathVerifier:
    """math-verify limits its own time by SIGALRM, which works in a main thread only and not while C code runs. Here
    that is switched off, and a child process that misses the deadline is ended and replaced. The child starts with the
    first answer."""

    def __init__(self, timeout_seconds: float = 10.0) -> None:
        if timeout_seconds <= 0:
            raise ValueError(f"timeout_seconds={timeout_seconds} must be positive")
        self.timeout_seconds = timeout_seconds
        self.num_timeouts = 0
        self._process: multiprocessing.process.BaseProcess | None = None
        self._connection: Connection | None = None

    def grade(self, completion: str, answer: str) -> bool | None:
        """Whether the completion's last expression equals the answer; None if the answer is empty or time ran out."""
        connection = self._started()
        try:
            connection.send((completion, answer))
            if connection.poll(self.timeout_seconds):
                return connection.recv()
        except (EOFError, BrokenPipeError, ConnectionResetError):
            pass  # the child died over this answer (out of memory, say): as good as a timeout
        except BaseException:
            self.close()  # interrupted between question and answer: the next question must not get this one's answer
            raise
        self.num_timeouts += 1
        self.close()
        return None

    def close(self) -> None:
        if self._process is not None:
            self._connection.close()
            self._process.kill()
            self._process.join()
        self._process = self._connection = None

    def _started(self) -> Connection:
        if self._process is None or not self._process.is_alive():
            self.close()
            context = multiprocessing.get_context("spawn")
            self._connection, childs_end = context.Pipe()
            self._process = context.Process(target=_serve, args=(childs_end,), daemon=True, name="math-verify")
            self._process.start()
            childs_end.close()
            if not self._connection.poll(START_SECONDS) or self._connection.recv() != "ready":
                self.close()
                raise RuntimeError(f"the math-verify process didn't start within {START_SECONDS:.0f} s")
        return self._connection


def _serve(connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole terminal; the parent decides
    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the switched-off time limit
    import math_verify  # noqa: F401

    connection.send("ready")
    while True:
        try:
            completion, answer = connection.recv()
        except EOFError:  # the parent has gone
            return
        connection.send(equals(completion, answer))


def equals(completion: str, answer: str) -> bool | None:
    """Whether two texts' final expressions are equal, with no time limit; None if the answer holds no expression."""
    from math_verify import parse, verify

    gold = _parse(parse, answer)
    if not gold:
        return None
    return bool(verify(gold, _parse(parse, completion), timeout_seconds=None))


def _parse(parse, text: str) -> list:
    """Parsed as it stands, or as a formula where it has no delimiters (a bare `\\frac{1}{2}`)."""
    return parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)
