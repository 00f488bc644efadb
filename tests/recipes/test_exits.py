from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import pytest

from recipes.exits import UserError, exit_code, user_errors


@pytest.fixture(autouse=True)
def signal_handlers_restored() -> Iterator[None]:
    previous = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, previous)


def send(signum: int) -> None:
    os.kill(os.getpid(), signum)
    time.sleep(5)  # the signal ends this


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_unwinds_the_recipe_and_sets_the_exit_code(signum: int, code: int):
    unwound = []

    def recipe() -> None:
        try:
            send(signum)
        finally:
            unwound.append(True)

    assert exit_code(recipe) == code
    assert unwound == [True]


def test_done_is_zero_and_rays_own_exit_counts_as_sigterm():
    assert exit_code(lambda: None) == 0
    assert exit_code(lambda: sys.exit(15)) == 143


def test_a_users_mistake_is_one_line(capsys: pytest.CaptureFixture[str]):
    def recipe() -> None:
        with user_errors():
            raise ValueError("num_steps=-1 must not be negative")

    assert exit_code(recipe) == 2
    assert capsys.readouterr().err == "error: num_steps=-1 must not be negative\n"


def test_what_is_always_the_users_to_mend_is_one_line_whenever_it_comes(capsys: pytest.CaptureFixture[str]):
    def recipe() -> None:
        with user_errors(until=lambda: True, always=OSError):
            raise OSError("the disk is full")

    assert exit_code(recipe) == 2
    assert capsys.readouterr().err == "error: the disk is full\n"


def test_other_errors_keep_their_traceback():
    def fail() -> None:
        raise ValueError("broken")

    with pytest.raises(ValueError, match="broken"):
        exit_code(fail)
    with pytest.raises(ValueError, match="broken") as error, user_errors(until=lambda: True):
        fail()
    assert not isinstance(error.value, UserError)
