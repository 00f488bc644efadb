from __future__ import annotations

import os
import signal
import threading
import time

import psutil
import pytest

from engine import LLMEngine, SamplingParams
from rollout import EngineError, RolloutPool

PARAMS = SamplingParams(n=2, max_tokens=24, ignore_eos=True)
LONG = SamplingParams(n=2, max_tokens=200, ignore_eos=True)
PROMPTS = [[7 + i, 11, 13 + i, 17] for i in range(16)]
IDS = [f"p{i}" for i in range(len(PROMPTS))]


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def num_generated(pool: RolloutPool) -> int:
    return sum(stats.num_generated_tokens for stats in pool.stats().engines)


def kill(pool: RolloutPool, place: int = 0) -> None:
    os.kill(pool.engine_infos[place].pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(local_ray, config):
    with RolloutPool(config, num_engines=2, seed=5) as pool:
        return pool.generate(PROMPTS, LONG, group_ids=IDS)


def test_a_killed_engine_is_replaced_and_its_rollouts_are_the_same_bits(undisturbed, config):
    with RolloutPool(config, num_engines=2, seed=5) as pool:
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for(lambda: num_generated(pool) > 100)
        kill(pool)
        arrived = {group[0].group_id: group for group in stream}
        assert [arrived[group_id] for group_id in IDS] == undisturbed
        wait_for(lambda: len(pool.stats().engines) == 2)
        stats = pool.stats()
        assert stats.num_restarts == 1
        assert 0 < stats.num_redrawn_groups <= len(PROMPTS)
        assert stats.num_groups_running == 0
        [fault] = stats.faults
        assert fault.phase == "serve"
        assert "died" in fault.cause
        assert pool.generate(PROMPTS, LONG, group_ids=IDS) == undisturbed
        pool.check_integrity()


def test_all_engines_may_die_at_once(undisturbed, config):
    with RolloutPool(config, num_engines=2, seed=5) as pool:
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for(lambda: num_generated(pool) > 100)
        kill(pool, 1)
        kill(pool, 0)
        assert sorted(stream, key=lambda group: IDS.index(group[0].group_id)) == undisturbed


def test_a_replacement_takes_the_weights_in_force(local_ray, config, make_weights, forward_logprobs):
    weights = make_weights(3)
    with RolloutPool(config, num_engines=1, seed=5) as pool:
        pool.sync_weights(weights, 4)
        before = pool.generate(PROMPTS[:4], PARAMS, group_ids=IDS[:4])
        kill(pool)
        assert pool.generate(PROMPTS[:4], PARAMS, group_ids=IDS[:4]) == before
        assert {version for group in before for rollout in group for version in rollout.policy_versions} == {4}
        assert before[0][0].logprobs == forward_logprobs(weights, before[0][0])


def test_tokens_of_an_older_version_survive_their_engine(local_ray, config, make_weights, forward_logprobs):
    weights = {version: make_weights(version) for version in (1, 2)}
    with RolloutPool(config, num_engines=1, seed=5) as pool:
        pool.sync_weights(weights[1], 1)
        stream = pool.stream(PROMPTS[:4], LONG, group_ids=IDS[:4])
        wait_for(lambda: num_generated(pool) > 100)
        pool.sync_weights(weights[2], 2)
        kill(pool)
        rollouts = [rollout for group in stream for rollout in group]
        assert pool.stats().num_restarts == 1
    assert {version for rollout in rollouts for version in rollout.policy_versions} == {1, 2}
    for rollout in rollouts:
        assert len(rollout.token_ids) == LONG.max_tokens
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


@pytest.mark.parametrize("mode", ["recompute", "wait"])
def test_an_engine_killed_in_a_sync_costs_nothing(local_ray, config, make_weights, forward_logprobs, mode):
    weights = {version: make_weights(version) for version in (1, 2)}
    with RolloutPool(config, num_engines=2, seed=5) as pool:
        pool.sync_weights(weights[1], 1)
        whole = pool.generate(PROMPTS, LONG, group_ids=IDS)
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for(lambda: num_generated(pool) > 2 * len(PROMPTS) * LONG.max_tokens + 100)
        killer = threading.Timer(0.05, kill, (pool, 1))
        killer.start()
        report = pool.sync_weights(weights[2], 2, mode=mode)
        assert report.is_lockstep
        groups = sorted(stream, key=lambda group: IDS.index(group[0].group_id))
        killer.join()
        wait_for(lambda: len(pool.stats().engines) == 2)
        assert {stats.policy_version for stats in pool.stats().engines} == {2}
        pool.check_integrity()
    if mode == "wait":  # all had begun, so all end as if nothing had happened
        assert groups == whole
        return
    for rollout in [rollout for group in groups for rollout in group][::5]:
        under = {version: forward_logprobs(weights[version], rollout) for version in weights}
        assert rollout.logprobs == [under[v][i] for i, v in enumerate(rollout.policy_versions)]


def test_an_engine_that_hangs_is_named_killed_and_replaced(undisturbed, config):
    with RolloutPool(config, num_engines=2, seed=5, hang_seconds=2.0) as pool:
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        wait_for(lambda: num_generated(pool) > 100)
        os.kill(pool.engine_infos[0].pid, signal.SIGSTOP)
        assert sorted(stream, key=lambda group: IDS.index(group[0].group_id)) == undisturbed
        [fault] = pool.stats().faults
        assert fault.phase == "hang"
        assert "has not answered for 2 s" in fault.cause


def test_a_step_that_hangs_is_named_with_its_phase_and_requests(local_ray, config):
    class Hanging(LLMEngine):
        def step(self):
            if self.stats().num_steps == 5 and self.policy_version == 0 and not os.path.exists(self.config.trace_path):
                open(self.config.trace_path, "w").close()
                time.sleep(600)
            return super().step()

    from dataclasses import replace
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as directory:
        once = replace(config, trace_path=f"{directory}/hung-once")
        with RolloutPool(once, seed=5, hang_seconds=2.0, engine_factory=Hanging) as pool:
            [group] = pool.generate([[5, 6]], PARAMS, group_ids=["slow"])
            assert len(group) == PARAMS.n
            [fault] = pool.stats().faults
    assert fault.phase == "hang"
    assert "in phase 'step'" in fault.cause
    assert "1 groups open (slow)" in fault.cause


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


def test_scaling_up_and_down_while_groups_run_changes_no_bit(undisturbed, config):
    with RolloutPool(config, num_engines=1, seed=5) as pool:
        stream = pool.stream(PROMPTS, LONG, group_ids=IDS)
        assert len(pool.scale(2)) == 2
        second = pool.stream(PROMPTS, LONG, group_ids=[f"second {i}" for i in range(len(PROMPTS))])
        wait_for(lambda: min(stats.num_generated_tokens for stats in pool.stats().engines) > 50)
        pids = [info.pid for info in pool.engine_infos]
        assert [info.pid for info in pool.scale(1)] == pids[:1]
        assert sorted(stream, key=lambda group: IDS.index(group[0].group_id)) == undisturbed
        assert len(list(second)) == len(PROMPTS)
        wait_for(lambda: not psutil.pid_exists(pids[1]))
        assert pool.stats().num_restarts == 0
        with pytest.raises(ValueError, match="num_engines=0"):
            pool.scale(0)


def test_the_death_of_the_driver_ends_its_engines(config, tmp_path):
    import subprocess
    import sys

    script = f"""
import sys; sys.path.insert(0, {os.getcwd()!r})
from rollout import EngineConfig, RolloutPool, SamplingParams
pool = RolloutPool(EngineConfig({config.model!r}, num_threads=1, num_blocks=512), num_engines=2)
stream = pool.stream([[5, 6]] * 64, SamplingParams(max_tokens=400, ignore_eos=True))
print(*(info.pid for info in pool.engine_infos), flush=True)
list(stream)
"""
    driver = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=tmp_path)
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 2
    driver.kill()
    driver.wait()
    wait_for(lambda: not any(psutil.pid_exists(pid) for pid in pids))
