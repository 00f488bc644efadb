from __future__ import annotations

import random

import pytest
import ray

from engine import SamplingParams
from rollout import RolloutPool
from tests.rollout.killing import MOMENTS, Orders, dying_amid, mortal_engines

PARAMS = SamplingParams(n=5, max_tokens=20, ignore_eos=True)
ORDERED = ("step", "start", "delivery", "staging", "commit", "after commit")


def prompts_of(step: int, num_prompts: int) -> list[list[int]]:
    draw = random.Random(step)
    return [[draw.randrange(5, 200) for _ in range(draw.randrange(3, 40))] for _ in range(num_prompts)]


def run(pool: RolloutPool, make_weights, num_steps: int, num_prompts: int, before_step, named_tensors) -> list:
    """A synchronous loop: draw, sync, draw, ..."""
    drawn = []
    for step in range(num_steps):
        before_step(step)
        ids = [f"{step}/{i}" for i in range(num_prompts)]
        drawn.append(pool.generate(prompts_of(step, num_prompts), PARAMS, group_ids=ids))
        report = pool.sync_weights(named_tensors(make_weights(step % 7)), step + 1)
        assert report.is_lockstep
    return drawn


def check_kills(local_ray, config, make_weights, tmp_path, num_kills: int, num_steps: int, num_prompts: int) -> None:
    """Kills spread over the steps, at every moment of an engine's life; not a bit differs from an undisturbed run."""
    orders, draw = Orders(tmp_path), random.Random(num_kills)
    moments = [ORDERED[i % len(ORDERED)] for i in range(num_kills)]
    draw.shuffle(moments)
    at = [i * (num_steps - 1) // num_kills for i in range(num_kills)]
    given = list(zip(at, moments, strict=True))

    def give_orders(step: int) -> None:
        for _, moment in (order for order in given if order[0] == step):
            orders.give(moment)
            if moment == "start":  # which somebody must come to
                orders.give("step")

    with RolloutPool(config, num_engines=2, seed=3, engine_factory=mortal_engines(orders)) as pool:
        disturbed = run(
            pool,
            make_weights,
            num_steps,
            num_prompts,
            give_orders,
            lambda weights: dying_amid(weights, orders, lambda: [info.pid for info in pool.engine_infos]),
        )
        pool.check_integrity()
        stats = pool.stats()
    with RolloutPool(config, num_engines=1, seed=3) as pool:
        undisturbed = run(pool, make_weights, num_steps, num_prompts, lambda step: None, dict)
    done = orders.num_done()
    assert sum(done.values()) >= num_kills, f"not all died: {done}"
    assert all(done[moment] for moment in MOMENTS), f"no engine died at some moment: {done}"
    assert len(stats.faults) == min(100, sum(done.values()))
    names = [(rollout.group_id, rollout.index) for groups in disturbed for group in groups for rollout in group]
    assert len(names) == len(set(names)) == num_steps * num_prompts * PARAMS.n
    assert disturbed == undisturbed


def test_engines_killed_at_every_moment_of_their_life_change_no_bit(local_ray, config, make_weights, tmp_path):
    check_kills(local_ray, config, make_weights, tmp_path, num_kills=6, num_steps=8, num_prompts=6)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_a_hundred_kills_over_five_thousand_rollouts_change_no_bit(local_ray, config, make_weights, tmp_path):
    check_kills(local_ray, config, make_weights, tmp_path, num_kills=100, num_steps=50, num_prompts=20)
    assert ray.is_initialized()
