"""Reward functions that do what goes wrong in real ones; light to import, since reward processes import them."""

from __future__ import annotations

import asyncio
import math
import os
import re
import signal
import subprocess
import sys
import time

CATASTROPHE = re.compile(r"(a+)+$")


def value(completions):
    return [float(text) for text in completions]


async def value_later(completions):
    await asyncio.sleep(0.01)
    return [float(text) for text in completions]


def has_letter_e(completions):
    return [float("e" in text) for text in completions]


def hangs_over_hard_prompts(completions, level):
    if level[0] == "hard":
        time.sleep(1000)
    return has_letter_e(completions)


def sleeps_at_4(completions):
    if " 4" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


def hangs_in_c_at_4(completions):
    """One call of the regex engine, which neither a signal handler nor another thread can end."""
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        signal.signal(signum, signal.SIG_IGN)
    if " 4" in completions:
        CATASTROPHE.match("a" * 60 + "b")
    return [1.0] * len(completions)


def is_killed_at_4(completions):
    if " 4" in completions:
        os.kill(os.getpid(), signal.SIGKILL)
    return [1.0] * len(completions)


def exits_at_4(completions):
    if " 4" in completions:
        sys.exit("goodbye")
    return [1.0] * len(completions)


async def waits_at_4(completions):
    await asyncio.sleep(1000 if " 4" in completions else 0.01)
    return [1.0] * len(completions)


async def blocks_at_4(completions):
    """A coroutine that never lets its event loop go."""
    await asyncio.sleep(0.01)
    if " 4" in completions:
        time.sleep(1000)
    return [1.0] * len(completions)


async def has_a_timeout_of_its_own_at_4(completions):
    if " 4" in completions:
        raise TimeoutError("the judge's server didn't answer")
    return [1.0] * len(completions)


def raises_at_4(completions):
    return [1.0 / (float(text) - 4.0) and 1.0 for text in completions]


def is_not_a_number_at_4(completions):
    return [math.nan if text == " 4" else 1.0 for text in completions]


def always_sleeps(completions):
    time.sleep(1000)


def starts_a_program_and_sleeps(completions, path):
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"])
    with open(path[0], "w") as file:
        file.write(str(program.pid))
    time.sleep(1000)


def process_id(completions):
    return [float(os.getpid())] * len(completions)


def largest_of_group(completions):
    """Compares a group's samples, and fails in its first call."""
    largest_of_group.calls += 1
    if largest_of_group.calls == 1:
        raise RuntimeError("the first call")
    values = [float(text) for text in completions]
    return [float(value == max(values)) for value in values]


largest_of_group.calls, largest_of_group.compares_samples = 0, True


def compute_score(data_source, solution_str, ground_truth, extra_info=None):
    if data_source != "sums":
        raise NotImplementedError(data_source)
    score = None if solution_str == "?" else float(solution_str == ground_truth)
    return {"score": score, "index": extra_info["index"]} if extra_info else score


async def compute_score_later(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0.01)
    return compute_score(data_source, solution_str, ground_truth, extra_info)


class CountsCalls:
    """Holds state: the calls that this copy has had."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.num_loads = 0

    def __setstate__(self, state) -> None:
        self.__dict__ = state
        self.num_loads += 1

    def __call__(self, completions):
        self.num_calls += 1
        return [100.0 * self.num_loads + self.num_calls] * len(completions)


class Unloadable:
    """Can be pickled, and not loaded where it arrives."""

    def __reduce__(self):
        return _fail, ()

    def __call__(self, completions):
        return [1.0] * len(completions)


def _fail():
    raise FileNotFoundError("the judge's weights are not here")
