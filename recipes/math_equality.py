"""Math equality: whether two mathematical texts end in the same value, by math-verify."""

from __future__ import annotations

import functools
import logging
from types import ModuleType


def equals(completion: str, answer: str) -> bool | None:
    """Whether two texts' final expressions are equal, with no time limit; None if the answer holds no expression.

    math-verify would limit its own time by SIGALRM, which works in a main thread only and not while C code runs.
    """
    gold = _parse(answer)
    if not gold:
        return None
    return bool(_math_verify().verify(gold, _parse(completion), timeout_seconds=None))


def _parse(text: str) -> list:
    """Parsed as it stands, or as a formula where it has no delimiters (a bare `\\frac{1}{2}`)."""
    parse = _math_verify().parse
    return parse(text, parsing_timeout=None) or parse(f"${text}$", parsing_timeout=None)


@functools.cache
def _math_verify() -> ModuleType:
    import math_verify

    logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns of the switched-off time limit
    return math_verify
