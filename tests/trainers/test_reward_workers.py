from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from pathlib import Path

import pytest
import reward_functions as functions

from trainers.rewards import RewardScorer

ROWS = [{"prompt": "1 + 1 =", "answer": "2"}, {"prompt": "2 + 3 =", "answer": "5"}]


@pytest.fixture
def groups(make_rollout):
    """Two groups of three samples with the texts 0, 1, 2 | 3, 4, 5."""
    return [[make_rollout([1], [2], text=f" {3 * p + i}", index=i) for i in range(3)] for p in range(2)]


@pytest.fixture(autouse=True)
def _no_process_is_left() -> Iterator[None]:
    before = reward_processes()
    yield
    assert reward_processes() <= before


def reward_processes() -> set[int]:
    """Reward processes that this one has started."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended meanwhile
            parent = int((entry / "stat").read_text().rsplit(")", 1)[1].split()[1])
            if parent == os.getpid() and "reward_process" in (entry / "cmdline").read_text():
                found.add(int(entry.name))
    return found


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def wait_until_gone(pid: int) -> None:
    end = time.monotonic() + 10
    while is_running(pid):
        assert time.monotonic() < end, f"process {pid} is still there"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("culprit", "num_failed", "num_timed_out"),
    [
        (functions.sleeps_at_4, 0, 1),
        (functions.hangs_in_c_at_4, 0, 1),
        (functions.waits_at_4, 0, 1),
        (functions.blocks_at_4, 0, 1),
        (functions.is_killed_at_4, 1, 0),
        (functions.exits_at_4, 1, 0),
        (functions.raises_at_4, 1, 0),
        (functions.has_a_timeout_of_its_own_at_4, 1, 0),
        (functions.is_not_a_number_at_4, 1, 0),
    ],
)
def test_a_bad_sample_is_masked_alone_and_the_next_batch_is_whole(groups, culprit, num_failed, num_timed_out):
    with RewardScorer([functions.value, culprit, functions.value_later], num_processes=2, timeout=1.0) as scorer:
        rewards = scorer.score(ROWS, groups)
        assert rewards.total.isnan().tolist() == [[False, False, False], [False, True, False]]
        assert rewards.total[0].tolist() == [1.0, 3.0, 5.0]
        assert (rewards.num_failed, rewards.num_timed_out) == (num_failed, num_timed_out)
        assert rewards.by_function["value"].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        again = scorer.score(ROWS, [groups[0], groups[0]])
        assert again.total.tolist() == [[1.0, 3.0, 5.0]] * 2
        assert again.num_failed == again.num_timed_out == 0


def test_rewards_come_back_in_order_and_as_in_this_process(groups):
    with RewardScorer([functions.value, functions.value_later], num_processes=0) as scorer:
        expected = scorer.score(ROWS * 10, groups * 10)
    with RewardScorer([functions.value, functions.value_later], num_processes=3) as scorer:
        rewards = scorer.score(ROWS * 10, groups * 10)
    assert rewards.total.equal(expected.total)


def test_a_function_that_always_hangs_takes_a_deadline_per_sample_and_no_more(groups):
    with RewardScorer([functions.always_sleeps], num_processes=1, timeout=0.2) as scorer:
        scorer.score(ROWS[:1], [groups[0][:1]])  # the processes' starts are not timed
        start = time.monotonic()
        rewards = scorer.score(ROWS[:1], groups[:1])
        assert time.monotonic() - start >= 0.2 * (1 + 3)
    assert rewards.total.isnan().all()
    assert (rewards.num_failed, rewards.num_timed_out) == (0, 3)


def test_a_process_that_dies_between_calls_costs_no_sample(groups):
    with RewardScorer([functions.process_id], num_processes=1) as scorer:
        first = int(scorer.score(ROWS[:1], groups[:1]).total[0, 0])
        os.kill(first, signal.SIGKILL)
        wait_until_gone(first)
        rewards = scorer.score(ROWS[:1], groups[:1])
        assert rewards.num_failed == 0
        assert int(rewards.total[0, 0]) not in (first, os.getpid())


def test_programs_that_a_reward_started_are_killed_with_it(groups, tmp_path):
    row = {"prompt": "?", "path": str(tmp_path / "pid")}
    with RewardScorer([functions.starts_a_program_and_sleeps], num_processes=1, timeout=1.0) as scorer:
        assert scorer.score([row], [groups[0][:1]]).num_timed_out == 1
        wait_until_gone(int((tmp_path / "pid").read_text()))


def test_a_function_with_state_is_sent_once_to_each_process(groups):
    with RewardScorer([functions.CountsCalls()], num_processes=1) as scorer:
        rewards = [scorer.score(ROWS, groups).total.tolist() for _ in range(2)]
    assert rewards == [[[101.0] * 3, [102.0] * 3], [[103.0] * 3, [104.0] * 3]]


def test_lambdas_and_closures_travel_whole(groups):
    offset = 10.0
    plus = lambda completions: [float(text) + offset for text in completions]
    with RewardScorer([plus], num_processes=1) as scorer:
        assert scorer.score(ROWS, groups).total.tolist() == [[10.0, 11.0, 12.0], [13.0, 14.0, 15.0]]


def test_a_function_that_cannot_be_sent_is_refused_at_once():
    lock = threading.Lock()

    def locked(completions):
        with lock:
            return [1.0] * len(completions)

    with pytest.raises(ValueError, match=r"\['locked'\] can't be sent .*lock.* reward_processes=0"):
        RewardScorer([locked], num_processes=1)


def test_a_column_that_cannot_be_sent_is_named(groups):
    with RewardScorer([functions.value], num_processes=1) as scorer:
        with pytest.raises(ValueError, match=r"columns .*'guard'.* can't be sent"):
            scorer.score([ROWS[0] | {"guard": threading.Lock()}], groups[:1])
        assert scorer.score(ROWS, groups).num_failed == 0


def test_functions_that_cannot_be_loaded_are_an_error_and_no_hang(groups):
    with (
        RewardScorer([functions.Unloadable()], num_processes=1) as scorer,
        pytest.raises(RuntimeError, match=r"(?s)could not load.*weights are not here"),
    ):
        scorer.score(ROWS, groups)


def test_coroutines_of_all_groups_run_at_the_same_time(make_rollout):
    rows = [{"prompt": str(p)} for p in range(20)]
    groups = [[make_rollout([1], [2], text=" 1")] for _ in rows]

    async def takes_a_while(completions):
        import asyncio

        await asyncio.sleep(0.5)
        return [1.0]

    with RewardScorer([takes_a_while], num_processes=1) as scorer:
        scorer.score(rows[:1], groups[:1])
        start = time.monotonic()
        assert scorer.score(rows, groups).total.sum() == 20
        assert time.monotonic() - start < 20 * 0.5 / 2


def test_groups_are_scored_while_others_are_still_to_come(groups):
    with RewardScorer([functions.value], num_processes=1) as scorer:
        pending = scorer.submit(ROWS[0], groups[0])
        end = time.monotonic() + 30
        while not pending.done():
            assert time.monotonic() < end
            time.sleep(0.01)
        rewards = scorer.gather([pending, scorer.submit(ROWS[1], groups[1])])
    assert rewards.total.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]


def test_closing_ends_a_call_under_way_and_those_that_wait(groups):
    scorer = RewardScorer([functions.process_id, functions.always_sleeps], num_processes=1)
    process = int(scorer.submit(ROWS[0], groups[0])._futures[0].result().rewards[0])
    waiting = scorer.submit(ROWS[0], groups[0])
    start = time.monotonic()
    scorer.close()
    assert time.monotonic() - start < 10
    assert not is_running(process)
    with pytest.raises((RuntimeError, CancelledError)):
        waiting.result()
    with pytest.raises(RuntimeError, match="were closed"):
        scorer.submit(ROWS[0], groups[0])
    scorer.close()


def test_a_killed_driver_leaves_no_process_even_in_a_hang_and_needs_no_main_guard(tmp_path):
    script = tmp_path / "driver.py"
    script.write_text(
        textwrap.dedent("""
        import re, os
        from types import SimpleNamespace
        from trainers.rewards import RewardScorer

        def hangs(completions):
            print(os.getpid(), flush=True)
            re.match(r"(a+)+$", "a" * 60 + "b")

        RewardScorer([hangs]).score([{"prompt": "?"}], [[SimpleNamespace(text="", token_ids=[])]])
        """)
    )
    environment = os.environ | {"PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment) as driver:
        worker = int(driver.stdout.readline())
        assert is_running(worker)
        driver.kill()
    wait_until_gone(worker)


def test_a_reward_process_imports_neither_torch_nor_ray():
    code = "import sys, trainers.reward_process; print([m for m in ('torch', 'ray', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
