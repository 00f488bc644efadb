"""The worker threads: whatever else the machine does, an operation ends with all its tiles done, and done once."""

from __future__ import annotations

import subprocess
import sys
import threading
import time

import pytest
import torch
from kernel_checks import assert_same_bits, num_different, pack, spread

from kernels.library import get_num_threads, library, set_num_threads
from kernels.linear import linear


def _job(seed: int, num_rows: int = 24, num_outputs: int = 320):
    """(x, packed weight, product): an operation of several tiles that takes some 50 microseconds."""
    x, packed = spread(num_rows, 64, seed=seed), pack(spread(num_outputs, 64, seed=seed + 1))
    set_num_threads(1)
    return x, packed, linear(x, packed, num_outputs)


def test_thread_counts_are_set_and_checked():
    for wanted in (1, 4, 2, 3):
        assert set_num_threads(wanted) == wanted
        assert get_num_threads() == wanted
    for wrong in (0, -1, 257):
        with pytest.raises(ValueError, match=f"num_threads={wrong} must lie between 1 and 256"):
            set_num_threads(wrong)
    assert get_num_threads() == 3


def test_workers_are_kept():
    before = threading.active_count()  # Python's threads; ours are not among them
    set_num_threads(4)
    tasks = _num_tasks()
    for _ in range(50):
        set_num_threads(1)
        set_num_threads(4)
    assert _num_tasks() == tasks
    assert threading.active_count() == before


def _num_tasks() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("Threads:"))


@pytest.mark.parametrize("num_threads", [2, 4])
def test_many_small_operations_in_a_row(num_threads):
    x, packed, expected = _job(1)
    set_num_threads(num_threads)
    for _ in range(1500):
        assert num_different(linear(x, packed, 320), expected) == 0


def _run_until(stop: threading.Event, job, failures: list[str], counts: list[int]) -> None:
    x, packed, expected = job
    count = 0
    while not stop.is_set():
        if num_different(linear(x, packed, expected.shape[1]), expected):
            failures.append(f"wrong bits in operation {count}")
        count += 1
    counts.append(count)


def test_two_callers_at_once_while_the_number_of_threads_changes():
    jobs = [_job(2), _job(4, num_rows=7, num_outputs=130)]
    stop, failures, counts = threading.Event(), [], []
    callers = [threading.Thread(target=_run_until, args=(stop, job, failures, counts)) for job in jobs]
    for caller in callers:
        caller.start()
    end = time.monotonic() + 1.5
    while time.monotonic() < end:
        for num_threads in (3, 1, 2, 4):
            set_num_threads(num_threads)
    stop.set()
    for caller in callers:
        caller.join(timeout=60)
        assert not caller.is_alive()
    assert failures == []
    assert min(counts) > 20


def test_operations_end_beside_processes_that_hog_the_cores():
    x, packed, expected = _job(6)
    set_num_threads(4)
    hogs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        end, count, slowest = time.monotonic() + 1.5, 0, 0.0
        while time.monotonic() < end:
            begin = time.monotonic()
            assert_same_bits(linear(x, packed, 320), expected)
            slowest = max(slowest, time.monotonic() - begin)
            count += 1
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    assert count > 100, f"{count} operations, the slowest took {slowest:.3f} s"


_FORK = """
import os, sys, threading, numpy, torch
from kernels.library import get_num_threads, set_num_threads
from kernels.linear import linear, pack_rows, packed_shape

x, weight = torch.randn(64, 64), torch.randn(640, 64)
packed = torch.zeros(packed_shape(640, 64))
pack_rows(packed, weight)
expected = linear(x, packed, 640)
set_num_threads(3)
is_running = True

def check():  # by numpy: the OpenMP threads of torch.equal would not survive the fork
    assert numpy.array_equal(linear(x, packed, 640).numpy(), expected.numpy())

def work():
    while is_running:
        linear(x, packed, 640)

worker = threading.Thread(target=work)
worker.start()  # forks fall into the middle of an operation
for _ in range(20):
    child = os.fork()
    if child == 0:
        try:
            assert get_num_threads() == 1
            check()
            assert set_num_threads(3) == 3
            for _ in range(20):
                check()
        except BaseException as error:
            print("child:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    check()
is_running = False
worker.join()
print("fine")
"""


def test_forked_children_start_threads_of_their_own():
    result = subprocess.run([sys.executable, "-c", _FORK], capture_output=True, text=True, timeout=120, check=False)
    assert result.stdout.strip() == "fine", result.stderr


def test_every_function_of_the_library_is_declared():
    assert library().ls_get_num_threads() == get_num_threads()
    with pytest.raises(Exception, match="argument"):
        library().ls_linear(torch.zeros(3))
