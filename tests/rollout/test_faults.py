from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass

import psutil
import pytest
import ray
from safetensors.torch import save_file

from engine import LLMEngine, SamplingParams
from rollout import EngineError, RolloutPool
from rollout.switch import LOST_CALLER_SECONDS
from tests.recipes.recipe_runs import is_agent
from tests.rollout.waiting import IDS, LONG, PROMPTS, has_ended, in_order, wait_for, wait_for_tokens

PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True)


def kill(pool: RolloutPool, place: int = 0) -> None:
    os.kill(pool.engine_infos[place].pid, signal.SIGKILL)


@dataclass
class Versions:
    """Hands out policy versions that increase from test to test."""

    version: int = 0

    def next(self) -> int:
        self.version += 1
        return self.version


@pytest.fixture(scope="module")
def versions() -> Versions:
    return Versions()


@pytest.fixture(scope="module")
def pool(local_ray, config):
    with RolloutPool(config, num_engines=2, seed=5, hang_seconds=3.0) as pool:
        yield pool


@pytest.fixture(scope="module")
def undisturbed(pool):
    """Drawn under the weights that the model came with."""
    return pool.generate(PROMPTS, LONG, group_ids=IDS)


@pytest.fixture
def whole_pool(pool):
    """With all its engines; afterwards nothing is left in any of them."""
    wait_for(lambda: len(pool.stats().engines) == 2)
    yield pool
    assert pool.stats().num_groups_running == 0
    pool.check_integrity()


def test_a_killed_engine_is_replaced_and_its_rollouts_are_the_same_bits(whole_pool, undisturbed):
    before = whole_pool.stats()
    stream = whole_pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(whole_pool)
    kill(whole_pool)
    assert in_order(stream) == undisturbed
    stats = whole_pool.stats()
    assert stats.num_restarts == before.num_restarts + 1
    assert 0 < stats.num_redrawn_groups - before.num_redrawn_groups <= len(PROMPTS)
    assert stats.faults[-1].phase == "serve"
    assert "died" in stats.faults[-1].cause


@pytest.mark.slow
def test_all_engines_may_die_at_once(whole_pool, undisturbed):
    stream = whole_pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(whole_pool)
    for pid in [info.pid for info in whole_pool.engine_infos]:
        os.kill(pid, signal.SIGKILL)
    assert in_order(stream) == undisturbed


def test_an_engine_that_hangs_is_named_killed_and_replaced(whole_pool, undisturbed):
    stream = whole_pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(whole_pool)
    os.kill(whole_pool.engine_infos[0].pid, signal.SIGSTOP)
    assert in_order(stream) == undisturbed
    fault = whole_pool.stats().faults[-1]
    assert fault.phase == "hang"
    assert "has not answered for 3 s" in fault.cause


def test_scaling_down_and_up_while_groups_run_changes_no_bit(whole_pool, undisturbed):
    before = whole_pool.stats().num_restarts
    pids = [info.pid for info in whole_pool.engine_infos]
    stream = whole_pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(whole_pool)
    assert [info.pid for info in whole_pool.scale(1)] == pids[:1]
    wait_for(lambda: has_ended(pids[1]))
    assert len(whole_pool.scale(2)) == 2
    assert in_order(stream) == undisturbed
    assert whole_pool.stats().num_restarts == before
    with pytest.raises(ValueError, match="num_engines=0"):
        whole_pool.scale(0)


def test_a_replacement_takes_the_weights_in_force(whole_pool, versions, make_weights, forward_logprobs):
    weights, version = make_weights(3), versions.next()
    whole_pool.sync_weights(weights, version)
    before = whole_pool.generate(PROMPTS[:4], PARAMS, group_ids=IDS[:4])
    for pid in [info.pid for info in whole_pool.engine_infos]:
        os.kill(pid, signal.SIGKILL)
    assert whole_pool.generate(PROMPTS[:4], PARAMS, group_ids=IDS[:4]) == before
    assert {version for group in before for rollout in group for version in rollout.policy_versions} == {version}
    assert before[0][0].logprobs == forward_logprobs(weights, before[0][0])


def test_tokens_of_an_older_version_survive_their_engine(whole_pool, versions, make_weights, forward_logprobs):
    old, new = versions.next(), versions.next()
    weights = {version: make_weights(version) for version in (old, new)}
    whole_pool.sync_weights(weights[old], old)
    stream = whole_pool.stream(PROMPTS[:4], LONG, group_ids=IDS[:4])
    wait_for_tokens(whole_pool)
    whole_pool.sync_weights(weights[new], new)
    for pid in [info.pid for info in whole_pool.engine_infos]:
        os.kill(pid, signal.SIGKILL)
    rollouts = [rollout for group in stream for rollout in group]
    assert {version for rollout in rollouts for version in rollout.policy_versions} == {old, new}
    for rollout in rollouts:
        assert len(rollout.token_ids) == LONG.max_tokens
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


@pytest.mark.parametrize("mode", ["recompute", pytest.param("wait", marks=pytest.mark.slow)])
def test_an_engine_killed_in_a_sync_costs_nothing(whole_pool, versions, make_weights, forward_logprobs, mode):
    old, new = versions.next(), versions.next()
    weights = {version: make_weights(version) for version in (old, new)}
    whole_pool.sync_weights(weights[old], old)
    whole = whole_pool.generate(PROMPTS, LONG, group_ids=IDS)
    stream = whole_pool.stream(PROMPTS, LONG, group_ids=IDS)
    wait_for_tokens(whole_pool)
    killer = threading.Timer(0.05, kill, (whole_pool, 1))
    killer.start()
    assert whole_pool.sync_weights(weights[new], new, mode=mode).is_lockstep
    groups = in_order(stream)
    killer.join()
    wait_for(lambda: len(whole_pool.stats().engines) == 2)
    assert {stats.policy_version for stats in whole_pool.stats().engines} == {new}
    if mode == "wait":  # all had begun, so all end as if nothing had happened
        assert groups == whole
        return
    for rollout in [rollout for group in groups for rollout in group][::5]:
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


@pytest.mark.slow
def test_a_sync_that_waits_gives_up_on_groups_whose_caller_is_gone(local_ray, config, make_weights):
    """Nobody draws again what a lost engine had for a dead caller, so the sync must not wait for it for ever."""

    @ray.remote(num_cpus=0)
    class Caller:
        def generate(self, handle):
            handle.generate(PROMPTS, LONG)

    with RolloutPool(config, num_engines=2) as pool:
        caller = Caller.remote()
        caller.generate.remote(pool.handle())
        wait_for(lambda: pool.stats().num_groups_running == len(PROMPTS))
        wait_for_tokens(pool)
        ray.kill(caller)
        kill(pool)
        report = pool.sync_weights(make_weights(1), 1, mode="wait")
        assert report.is_lockstep
        assert LOST_CALLER_SECONDS < report.seconds < 2 * LOST_CALLER_SECONDS
        pool.check_integrity()


def test_a_step_that_hangs_is_named_with_its_phase_and_requests(local_ray, config, tmp_path):
    class Hanging(LLMEngine):
        def step(self):
            if self.stats().num_steps == 5 and not (tmp_path / "hung-once").exists():
                (tmp_path / "hung-once").touch()
                time.sleep(600)
            return super().step()

    with RolloutPool(config, seed=5, hang_seconds=2.0, engine_factory=Hanging) as pool:
        [group] = pool.generate([[5, 6]], PARAMS, group_ids=["slow"])
        assert len(group) == PARAMS.n
        [fault] = pool.stats().faults
    assert fault.phase == "hang"
    assert "in phase 'step'" in fault.cause
    assert "1 groups open (slow)" in fault.cause


@pytest.mark.slow
def test_a_group_that_ends_every_engine_is_given_up_with_the_cause(local_ray, config):
    class Failing(LLMEngine):
        def step(self):
            if any(len(request.prompt_token_ids) == 3 for request in self.scheduler.running):
                raise ZeroDivisionError("the step went wrong")
            return super().step()

    with RolloutPool(config, engine_factory=Failing) as pool:
        with pytest.raises(EngineError, match=r"engine 0 failed: .*went wrong; that was engine number \d under"):
            pool.generate([[5, 6, 7]], PARAMS)
        assert len(pool.generate([[5, 6]], PARAMS)[0]) == PARAMS.n  # the pool goes on


@pytest.mark.slow
def test_an_engine_that_cannot_come_back_is_an_error_with_its_cause(local_ray, config, tmp_path):
    class Once(LLMEngine):
        def __init__(self, config):
            marker = tmp_path / "started"
            if marker.exists():
                raise OSError("the weights are gone")
            marker.touch()
            super().__init__(config)

    with RolloutPool(config, engine_factory=Once) as pool:
        stream = pool.stream([[5, 6]], LONG)
        kill(pool)
        with pytest.raises(EngineError, match=r"no engine is left to draw.*OSError: the weights are gone"):
            list(stream)
        assert [fault.phase for fault in pool.stats().faults] == ["serve", "start", "start", "start"]


DRIVER = """
import json, sys
import psutil
from rollout import EngineConfig, RolloutPool, SamplingParams
from safetensors.torch import load_file

pool = RolloutPool(EngineConfig(sys.argv[1], num_threads=1, num_blocks=512), num_engines=2)
pool.sync_weights(load_file(sys.argv[2]), 1)
stream = pool.stream([[5, 6]] * 64, SamplingParams(max_tokens=400, ignore_eos=True))
print(json.dumps([process.pid for process in psutil.Process().children(recursive=True)]), flush=True)
list(stream)
"""


def test_nothing_is_left_behind_by_a_driver_that_is_killed(config, make_weights, tmp_path):
    """What engines and stores of weights shared is memory without a name, which ends with those that hold it."""
    weights = tmp_path / "weights.safetensors"
    save_file(dict(make_weights(1)), weights)
    driver = subprocess.Popen(
        [sys.executable, "-c", DRIVER, config.model, str(weights)],
        cwd=tmp_path, env=without_ray_address() | {"PYTHONPATH": os.getcwd()}, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    started = json.loads(driver.stdout.readline())
    roles = [role for pid in started for role in ("EngineActor", "WeightStore") if role in command_line(pid)]
    assert sorted(roles) == ["EngineActor", "EngineActor", "WeightStore"]
    driver.kill()
    driver.wait()
    wait_for(lambda: all(has_ended(pid) or is_agent(command_line(pid)) for pid in started))


def without_ray_address() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}


def command_line(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return ""
