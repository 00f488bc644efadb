from __future__ import annotations

import io
import os
import pty
import sys

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


@pytest.fixture
def terminal(monkeypatch):
    """Standard error as a pseudo-terminal; what was written to it, once asked."""
    main, other = pty.openpty()
    stderr = os.fdopen(other, "w")
    monkeypatch.setattr(sys, "stderr", stderr)
    for name in ("NO_COLOR", "CI"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")

    def written() -> str:
        stderr.flush()
        os.set_blocking(main, False)
        pieces = []
        try:
            while piece := os.read(main, 65536):
                pieces.append(piece)
        except BlockingIOError:
            pass
        return b"".join(pieces).decode()

    yield written
    stderr.close()
    os.close(main)


def test_generate_shows_groups_and_tokens_on_a_terminal(pool, terminal):
    groups = pool.generate([[5], [6], [7]], PARAMS, progress=True)
    assert len(groups) == 3
    text = terminal()
    assert "3/3" in text
    assert "tokens/s" in text


def test_a_stream_shows_what_has_come_when_it_is_left(pool, terminal):
    stream = pool.stream(iter([[5], [6], [7]]), PARAMS, progress=True)
    next(stream)
    stream.close()
    text = terminal()
    assert "1/?" in text
    assert "3/" not in text


def test_nothing_is_shown_unasked(pool, terminal):
    pool.generate([[5], [6]], PARAMS)
    assert terminal() == ""


def test_nothing_is_shown_where_there_is_no_terminal(pool, capsys):
    assert len(pool.generate([[5], [6]], PARAMS, progress=True)) == 2
    assert capsys.readouterr() == ("", "")


def test_tokens_are_counted_over_all_samples(make_turn):
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with GroupProgress(2, console) as progress:
        progress.note([make_turn([1, 2, 3]), make_turn([4])])
        assert progress._num_tokens == 4
    assert "1/2" in console.file.getvalue()
