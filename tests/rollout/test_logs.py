from __future__ import annotations

import json
import logging
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from engine import SamplingParams
from rollout import RolloutPool, logs

LONG = SamplingParams(n=3, max_tokens=200, ignore_eos=True)
IDS = [f"group-{i}" for i in range(6)]


def lines_of(pool: str) -> list[dict]:
    """What a pool's processes wrote, from the files in which Ray keeps it; every line must be an object."""
    node = ray._private.worker.global_worker.node
    texts = [path.read_text() for path in Path(node.get_logs_dir_path()).glob("worker-*.err")]
    return [json.loads(line) for text in texts for line in text.splitlines() if f'"pool": "{pool}"' in line]


@pytest.fixture(scope="module")
def pool(local_ray, config) -> Iterator[RolloutPool]:
    with RolloutPool(config, num_engines=2, name="logged", max_staleness=0, groups_per_version=1) as pool:
        yield pool


@pytest.fixture(scope="module")
def lines(pool, make_weights) -> list[dict]:
    """Of a pool that has lost an engine at work, synced, refused a sync, and was scaled down."""
    stream = pool.stream([[5]] * 6, LONG, group_ids=IDS)
    os.kill(pool.engine_infos[1].pid, signal.SIGKILL)
    assert len(list(stream)) == 6
    pool.sync_weights(make_weights(1), 5)
    with pytest.raises(ValueError, match="must be greater"):
        pool.sync_weights(make_weights(1), 5)
    while len(pool.engines) < 2:
        time.sleep(0.1)
    pool.scale(1)
    return lines_of("logged")


def find(lines: list[dict], start: str) -> list[dict]:
    return [line for line in lines if line["message"].startswith(start)]


def test_every_line_says_when_who_and_how_bad(lines):
    for line in lines:
        assert list(line)[:4] == ["time", "level", "logger", "message"]
        assert line["level"] in logs.LEVELS
        assert line["actor"] in ("coordinator", "engine", "weight-store")
        assert line["time"].endswith("+00:00")


def test_an_engine_that_dies_is_named_with_its_life_the_cause_and_the_groups_that_move(lines):
    [lost] = find(lines, "engine 1 is lost")
    assert (lost["level"], lost["engine_id"], lost["incarnation"], lost["phase"]) == ("WARNING", 1, 0, "serve")
    assert "died" in lost["cause"]
    [moved] = find(lines, "groups of engine 1 go on elsewhere")
    assert (moved["engine_id"], moved["incarnation"]) == (1, 0)
    assert "died" in moved["cause"]
    assert 1 <= len(moved["group_ids"]) == min(moved["num_groups"], logs.NAMED_GROUPS)
    assert set(moved["group_ids"]) <= set(IDS)
    assert {line["engine_id"] for line in find(lines, "engine") if line["message"].endswith("has started")} == {0, 1}
    [replaced] = find(lines, "engine 1 is replaced")
    assert replaced["incarnation"] == 1
    assert replaced["seconds"] > 0


def test_a_sync_is_told_from_begin_to_commit(lines):
    [begun], [staged], [committed] = (
        find(lines, start) for start in ("weight sync begun", "weights staged", "weight sync committed")
    )
    assert begun["sync_id"] == staged["sync_id"] == committed["sync_id"]
    assert begun["policy_version"] == committed["policy_version"] == 5
    assert committed["bytes"] > 0 < committed["seconds"]
    [refused] = find(lines, "weight sync refused")
    assert refused["policy_version"] == 5


def test_a_scaled_down_engine_says_that_it_hands_over(lines):
    [handed] = find(lines, "engine 1 has handed over")
    assert handed["num_groups"] == 0


@pytest.fixture
def own_logging() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in logs.PACKAGES]
    before = [(logger, logger.handlers, logger.propagate, logger.level) for logger in loggers]
    yield
    for logger, handlers, propagate, level in before:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def test_text_and_level_are_chosen_by_the_environment(own_logging, monkeypatch, capsys):
    monkeypatch.setenv(logs.FORMAT_OPTION, "text")
    monkeypatch.setenv(logs.LEVEL_OPTION, "warning")
    assert logs.worker_env() == {logs.FORMAT_OPTION: "text", logs.LEVEL_OPTION: "WARNING"}
    logs.configure(pool="p", actor="engine")
    logging.getLogger("rollout.anything").info("not this")
    logging.getLogger("rollout.anything").warning("but %s", "this", extra={"engine_id": 3})
    written = capsys.readouterr().err
    assert "not this" not in written
    assert written.endswith("WARNING rollout.anything: but this [engine_id=3 pool=p actor=engine]\n")


def test_an_errors_traceback_stays_on_its_line(own_logging, capsys):
    logs.configure(pool="p", actor="engine")
    try:
        raise OSError("no\nroom")
    except OSError:
        logging.getLogger("engine").exception("it broke")
    [line] = capsys.readouterr().err.splitlines()
    assert "OSError: no\nroom" in json.loads(line)["traceback"]


@pytest.mark.parametrize(("name", "value"), [(logs.LEVEL_OPTION, "loud"), (logs.FORMAT_OPTION, "xml")])
def test_a_level_or_format_that_there_is_not_is_refused(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=f"{name}={value} must be one of"):
        logs.worker_env()


def test_groups_that_are_too_old_are_named(caplog, pool, lines, make_weights):
    with caplog.at_level(logging.INFO, "rollout.buffer"):
        pool.submit([[5]], SamplingParams(max_tokens=2), group_ids=["old"])
        while pool.stats().num_groups_running:
            time.sleep(0.05)
        pool.sync_weights(make_weights(2), 6)
        with pytest.raises(ValueError, match="1 were dropped as too old"):
            pool.collect(1)
    [record] = [one for one in caplog.records if "older than max_staleness=0" in one.getMessage()]
    assert (record.group_ids, record.num_groups, record.policy_version) == (["old"], 1, 6)
    pool.check_integrity()
