from __future__ import annotations

import contextlib
import io
import os
import pty

import pytest
from rich.console import Console

from engine import SamplingParams
from rollout import RolloutPool
from rollout.progress import GroupProgress

PARAMS = SamplingParams(n=2, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def pool(local_ray, config):
    with RolloutPool(config) as pool:
        yield pool


class Terminal:
    """A pseudo-terminal as standard error while it is entered; `text` is what was written to it.

    The test enters it itself: after a fixture, pytest sets standard error anew.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        self.text = ""

    def __enter__(self) -> Terminal:
        for name in ("NO_COLOR", "CI"):
            self._monkeypatch.delenv(name, raising=False)
        self._monkeypatch.setenv("TERM", "xterm")
        self._monkeypatch.setenv("COLUMNS", "120")
        self._main, other = pty.openpty()
        self._redirection = contextlib.redirect_stderr(os.fdopen(other, "w"))
        self._stderr = self._redirection.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._redirection.__exit__(*error)
        self._stderr.flush()
        os.set_blocking(self._main, False)
        written = b""
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(self._main, 65536):
                written += piece
        self.text = written.decode()
        self._stderr.close()
        os.close(self._main)


@pytest.fixture
def terminal(monkeypatch) -> Terminal:
    return Terminal(monkeypatch)


def test_generate_shows_groups_and_tokens_on_a_terminal(pool, terminal):
    with terminal:
        groups = pool.generate([[5], [6], [7]], PARAMS, progress=True)
    assert len(groups) == 3
    assert "3/3" in terminal.text
    assert "tokens/s" in terminal.text


def test_a_stream_shows_what_has_come_when_it_is_left(pool, terminal):
    with terminal:
        stream = pool.stream(iter([[5], [6], [7]]), PARAMS, progress=True)
        next(stream)
        stream.close()
    assert "1/?" in terminal.text
    assert "3/" not in terminal.text


def test_nothing_is_shown_unasked(pool, terminal):
    with terminal:
        pool.generate([[5], [6]], PARAMS)
    assert terminal.text == ""


def test_nothing_is_shown_where_there_is_no_terminal(pool, capsys):
    assert len(pool.generate([[5], [6]], PARAMS, progress=True)) == 2
    assert capsys.readouterr() == ("", "")


def test_tokens_are_counted_over_all_samples(make_turn):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with GroupProgress(2, console) as progress:
        progress.note([make_turn([1, 2, 3]), make_turn([4])])
        assert progress._num_tokens == 4
    assert "1/2" in console.file.getvalue()
