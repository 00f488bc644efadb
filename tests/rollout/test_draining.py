from __future__ import annotations

import itertools
import os
import re
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from engine import SamplingParams
from rollout import EpisodeRunner, Observation, PoolDrainingError, RolloutPool, draining_on_sigterm
from rollout.journal import read_journal
from rollout.journal_format import JournalledGroup
from tests.rollout.test_faults import PARAMS
from tests.rollout.waiting import IDS, LONG, PROMPTS, has_ended, in_order, wait_for, wait_for_tokens

SOURCE_ROOT = Path(__file__).resolve().parents[2]
ENDLESS = SamplingParams(n=2, max_tokens=480, ignore_eos=True)


@pytest.fixture
def pool(local_ray, config):
    """A drain is not taken back, so every test has a pool of its own; with short queues."""
    with RolloutPool(replace(config, max_num_seqs=32), num_engines=2, seed=5) as pool:
        yield pool
        assert pool.stats().num_groups_running == 0
        pool.check_integrity()


def test_running_groups_end_and_new_ones_are_refused(pool, make_weights):
    undisturbed = pool.generate(PROMPTS, LONG, group_ids=IDS)
    stream, handle = pool.stream(PROMPTS, LONG, group_ids=IDS), pool.handle()
    handle.submit(PROMPTS[:2], PARAMS)
    iterator = pool.stream(iter([[5, 6]] + [[7, 8]] * 10**6), PARAMS)
    wait_for_tokens(pool)
    drained = threading.Thread(target=handle.drain)
    drained.start()
    wait_for(lambda: pool.stats().is_draining)
    for draw in (pool.generate, handle.submit, lambda prompts: EpisodeRunner(pool, Silent).run([{}])):
        with pytest.raises(PoolDrainingError, match="the pool is draining, so it takes no new groups"):
            draw([[5, 6]])
    assert in_order(stream) == undisturbed
    arrived = []
    with pytest.raises(PoolDrainingError):
        arrived.extend(iterator)
    assert arrived
    drained.join(60)
    assert not drained.is_alive()
    assert len(handle.collect(2)) == 2
    assert pool.sync_weights(make_weights(1), 1).is_lockstep


class Silent:
    def reset(self, row, seed):
        return [5, 6]

    def step(self, turn):
        return Observation(is_done=True)


def test_what_takes_too_long_comes_back_partial(pool):
    whole = pool.generate(PROMPTS, LONG, group_ids=IDS)
    stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(pool)
    aborted = pool.drain(timeout=0)
    groups = in_order(stream)
    ended = {group[0].group_id for group in groups if any(rollout.finish_reason == "abort" for rollout in group)}
    assert ended
    assert ended <= set(aborted)
    for group, whole_group in zip(groups, whole, strict=True):
        for rollout, whole_rollout in zip(group, whole_group, strict=True):
            assert whole_rollout.token_ids[: len(rollout.token_ids)] == rollout.token_ids
            assert whole_rollout.logprobs[: len(rollout.token_ids)] == rollout.logprobs
    assert any(0 < len(rollout.token_ids) < LONG.max_tokens for group in groups for rollout in group)
    with pytest.raises(ValueError, match="timeout=-1"):
        pool.drain(timeout=-1)


LOOP = """
import itertools, sys
from rollout import EngineConfig, RolloutPool, SamplingParams, draining_on_sigterm
from tests.rollout.test_draining import ENDLESS, PROMPTS

config, grace_seconds = EngineConfig(sys.argv[1], num_threads=1, num_blocks=512), float(sys.argv[2])
with RolloutPool(config, num_engines=2, seed=5, journal=sys.argv[3]) as pool:
    with draining_on_sigterm(pool, grace_seconds):
        print(*(info.pid for info in pool.engine_infos), flush=True)
        for step in itertools.count():
            stream = pool.stream(PROMPTS, ENDLESS, group_ids=[f"{step}/{i}" for i in range(len(PROMPTS))])
            print("begun", step, flush=True)
            print("step", step, len(list(stream)), flush=True)
"""


class Loop:
    """A training loop in a process of its own, in the midst of its second step."""

    def __init__(self, model: str, grace_seconds: float, directory: Path) -> None:
        self.directory = directory
        environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", LOOP, model, str(grace_seconds), str(directory)],
            cwd=SOURCE_ROOT, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self.pids = [int(pid) for pid in self.process.stdout.readline().split()]
        assert len(self.pids) == 2
        for line in ("begun 0", f"step 0 {len(PROMPTS)}", "begun 1"):
            assert self.process.stdout.readline() == line + "\n"

    def wait(self) -> str:
        """What it still prints, once it and its engines are gone."""
        printed, errors = self.process.communicate(timeout=120)
        assert self.process.returncode == 143, errors
        assert "Traceback" not in errors
        wait_for(lambda: all(has_ended(pid) for pid in self.pids))
        return printed

    def journalled_groups(self) -> list[JournalledGroup]:
        journal = read_journal(self.directory)
        assert not journal.torn_files
        assert not any(file.num_torn_bytes for file in journal.files)
        return [group for file in journal.files for group in file.groups()]


def test_sigterm_lets_the_step_end_and_the_process_too(config, tmp_path):
    loop = Loop(config.model, 60.0, tmp_path)
    loop.process.send_signal(signal.SIGTERM)
    printed = loop.wait()
    steps = re.findall(r"step (\d+) 16\n", printed)
    assert steps
    groups = loop.journalled_groups()
    assert len(groups) == (1 + len(steps)) * len(PROMPTS)
    assert {sample.finish_reason for group in groups for sample in group.samples} == {"length"}


@pytest.mark.slow
@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_signals", [1, 2])
def test_sigterm_does_not_wait_longer_than_it_is_told(config, tmp_path, num_signals):
    """After the grace time, or at once on a second signal."""
    loop = Loop(config.model, 0.0 if num_signals == 1 else 3600.0, tmp_path)
    for _ in range(num_signals):
        loop.process.send_signal(signal.SIGTERM)
        time.sleep(0.2)  # two that come at once are one
    loop.wait()
    reasons = {sample.finish_reason for group in loop.journalled_groups() for sample in group.samples}
    assert reasons == ({"length", "abort"} if num_signals == 1 else {"length"})


def test_the_old_handler_comes_back_and_other_threads_are_refused(pool):
    before = signal.getsignal(signal.SIGTERM)
    with draining_on_sigterm(pool) as drain:
        assert signal.getsignal(signal.SIGTERM) is not before
        assert not drain.is_requested
    assert signal.getsignal(signal.SIGTERM) is before
    with pytest.raises(SystemExit, match="143"):
        draw_until_ended(pool)
    assert signal.getsignal(signal.SIGTERM) is before


def draw_until_ended(pool: RolloutPool) -> None:
    with draining_on_sigterm(pool, 5.0):
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in itertools.count():
            pool.generate(PROMPTS[:2], PARAMS)
