"""Random requests, aborts, forks, preemptions, weight switches and failed steps: nothing is lost, nothing leaks."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from fake_engine import BLOCK_SIZE, Engine, Limits, results
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from engine.outputs import Completion


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_results_do_not_depend_on_how_the_steps_are_cut(data):
    """The same requests on an ample engine and on a cramped one with other limits: the same tokens come out."""
    jobs = data.draw(
        st.lists(
            st.tuples(st.integers(1, 14), st.integers(1, 3), st.integers(1, 12), st.booleans(), st.integers(-1, 1)),
            min_size=1,
            max_size=8,
        )
    )
    cramped = Limits(
        max_num_seqs=data.draw(st.integers(3, 8)),
        max_num_batched_tokens=data.draw(st.integers(1, 20)),
        long_prefill_token_threshold=data.draw(st.sampled_from([0, 1, 3, 8])),
        num_scheduler_steps=data.draw(st.sampled_from([1, 1, 2, 5])),
    )
    depth = data.draw(st.integers(1, 2))
    num_blocks, block_size = data.draw(st.sampled_from([(7, 4), (9, 4), (25, 1), (5, 6)]))
    caching = data.draw(st.booleans())
    completions = []
    for engine in (
        Engine(Limits(max_num_batched_tokens=1000), num_blocks=500, eos_rate=0.05),
        Engine(cramped, num_blocks, block_size, caching, depth, eos_rate=0.05),
    ):
        for number, (num_prompt_tokens, n, max_tokens, is_common, priority) in enumerate(jobs):
            prompt = list(range(1, num_prompt_tokens + 1)) if is_common else num_prompt_tokens
            engine.add(f"r{number}", prompt, n=n, max_tokens=max_tokens, priority=priority)
        completions.append(results(engine.drain()))
    assert completions[0] == completions[1]
    assert len(completions[0]) == sum(n for _, n, *_ in jobs)


class SchedulerMachine(RuleBasedStateMachine):
    """Random requests, aborts, forks, preemptions, weight switches and failed steps on a small pool."""

    def __init__(self) -> None:
        super().__init__()
        self.expected: Counter[str] = Counter()  # samples asked for, by request id
        self.aborted: list[Completion] = []
        self.num_added = 0
        self.num_switches = 0

    @initialize(depth=st.integers(1, 2), num_steps=st.sampled_from([1, 1, 3]))
    def build(self, depth, num_steps):
        limits = Limits(
            max_num_seqs=5, max_num_batched_tokens=11, long_prefill_token_threshold=6, max_model_len=40,
            num_scheduler_steps=num_steps,
        )  # fmt: skip
        self.engine = Engine(limits, num_blocks=10, depth=depth, vocab_size=5, eos_rate=0.1)

    @rule(
        prompt=st.lists(st.integers(1, 2), min_size=1, max_size=18),
        n=st.integers(1, 4),
        max_tokens=st.integers(1, 20),
        priority=st.integers(0, 2),
        salt=st.sampled_from(["", "", "", "salt"]),
    )
    def add(self, prompt, n, max_tokens, priority, salt):
        name = f"r{self.num_added}"
        self.num_added += 1
        self.engine.add(name, prompt, n=n, max_tokens=max_tokens, priority=priority, salt=salt)
        self.expected[name] = n

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule(num_steps=st.integers(1, 6))
    def steps(self, num_steps):
        for _ in range(num_steps):
            if self.engine.scheduler.has_unfinished():
                self.engine.step()

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule(data=st.data(), is_within_step=st.booleans())
    def abort(self, data, is_within_step):
        engine = self.engine
        names = sorted(engine.scheduler._unfinished)
        chosen = data.draw(st.sets(st.sampled_from(names), min_size=1, max_size=3))
        if is_within_step and not engine.under_way:
            engine.launch(engine.scheduler.schedule())
        if not is_within_step:
            engine.settle()
        self.aborted += engine.scheduler.abort(engine.scheduler.unfinished_ids() & chosen)
        engine.scheduler.check_integrity()

    @rule(mode=st.sampled_from(["recompute", "keep"]), is_new=st.booleans())
    def set_weights(self, mode, is_new):
        self.num_switches += is_new
        self.engine.set_weights(b"v%d" % self.num_switches, mode)

    @rule(preempt_running=st.booleans())
    def reset_prefix_cache(self, preempt_running):
        self.engine.settle()
        self.engine.scheduler.reset_prefix_cache(preempt_running)

    @precondition(lambda self: self.engine.scheduler.has_unfinished())
    @rule()
    def fail_a_step(self):
        engine = self.engine
        if len(engine.under_way) < engine.depth:
            plan = engine.scheduler.schedule()
            for entry in plan.scheduled:
                for block_id in entry.request.block_ids[entry.start // BLOCK_SIZE :]:
                    engine.runner.slots[block_id] = [("broken", b"")] * BLOCK_SIZE
        engine.under_way.clear()
        engine.scheduler.abandon_steps()

    @invariant()
    def everything_adds_up(self):
        if not hasattr(self, "engine"):
            return
        self.engine.scheduler.check_integrity()
        done = Counter(c.request_id for c in self.engine.finished + self.aborted)
        waiting = {name: len(samples) for name, samples in self.engine.scheduler._unfinished.items()}
        assert done + Counter(waiting) == self.expected, "a sample is lost or was delivered twice"

    def teardown(self):
        self.engine.drain()
        delivered = Counter((c.request_id, c.index) for c in self.engine.finished + self.aborted)
        assert delivered == Counter({(name, i): 1 for name, n in self.expected.items() for i in range(n)})
        self.engine.scheduler.check_integrity()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=120, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(
    ("depth", "num_steps"), [*(pytest.param(depth, 1, marks=pytest.mark.slow) for depth in (1, 2)), (2, 4)]
)
def test_ten_thousand_random_requests_leave_every_block_free(depth, num_steps):
    generator = random.Random(0)
    limits = Limits(
        max_num_seqs=32, max_num_batched_tokens=128, long_prefill_token_threshold=24, max_model_len=48,
        num_scheduler_steps=num_steps,
    )  # fmt: skip
    engine = Engine(limits, num_blocks=110, block_size=2, depth=depth, eos_rate=0.08)
    expected: Counter[str] = Counter()
    aborted: list[Completion] = []
    while len(expected) < 10_000 or engine.scheduler.has_unfinished():
        while len(expected) < 10_000 and len(engine.scheduler.waiting) < 40:
            name = f"r{len(expected)}"
            expected[name] = generator.choice([1, 1, 1, 1, 2, 4])
            num_prompt_tokens = generator.randrange(1, 25)
            is_common = generator.random() < 0.5
            prompt = list(range(1, num_prompt_tokens + 1)) if is_common else num_prompt_tokens
            engine.add(name, prompt, n=expected[name], max_tokens=generator.randrange(1, 24))
        if generator.random() < 0.1:
            aborted += engine.scheduler.abort({generator.choice(list(engine.scheduler._unfinished))})
        if generator.random() < 0.01:
            engine.set_weights(b"v%d" % generator.randrange(3), generator.choice(["recompute", "keep"]))
        if engine.scheduler.has_unfinished():
            engine.step()
    engine.settle()
    delivered = Counter((c.request_id, c.index) for c in engine.finished + aborted)
    assert delivered == Counter({(name, i): 1 for name, n in expected.items() for i in range(n)})
    stats = engine.scheduler.stats()
    assert stats.num_free_blocks == stats.num_blocks
    assert stats.num_preemptions > 100
    assert engine.runner.num_copies > 100
    assert stats.prefix_cache_hits > 10_000
