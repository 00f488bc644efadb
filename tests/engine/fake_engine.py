"""A scheduler with a runner that remembers what was stored in each slot, and under which weights."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from engine.block_pool import BlockPool
from engine.outputs import Completion, StepOutput
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.step_plan import ModelRunnerOutput, ScheduledRequest, SchedulerOutput, later_step

EOS = 0
BLOCK_SIZE = 4


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The scheduler's part of the engine's configuration."""

    max_num_seqs: int = 8
    max_num_batched_tokens: int = 64
    long_prefill_token_threshold: int = 0
    max_model_len: int = 64
    num_scheduler_steps: int = 1


class Characters:
    """A tokenizer whose tokens are single characters."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool, clean_up_tokenization_spaces: bool) -> str:
        return "".join(chr(token_id % 0xD800) for token_id in token_ids if token_id != EOS)


@dataclass(frozen=True, kw_only=True)
class PreparedPlan:
    """A plan with what it needs of its requests."""

    plan: SchedulerOutput
    tables: list[list[int]]
    is_mixed: list[bool]


class FakeRunner:
    """Carries plans out on slots that each remember the whole prefix stored up to there, and by which weights.

    What it draws depends on that prefix, the request's seed and the sample alone, as the engine's tokens do.
    """

    def __init__(self, pool: BlockPool, vocab_size: int = 50, eos_rate: float = 0.0) -> None:
        self.pool = pool
        self.vocab_size = vocab_size
        self.eos_rate = eos_rate
        self.weights = b"v0"
        self.policy_version = 0
        self.slots: list[list[object]] = [[None] * pool.block_size for _ in range(pool.num_blocks)]
        self.num_copies = 0
        self.override: Callable[[Request], int] | None = None

    def prepare(self, plan: SchedulerOutput) -> PreparedPlan:
        """Takes from the requests what the step needs: they may move on before it runs."""
        for entry in plan.scheduled:
            self._check_own_blocks(entry)
        tables = [list(entry.request.block_ids) for entry in plan.scheduled]
        is_mixed = [entry.request.has_mixed_kv for entry in plan.scheduled]
        return PreparedPlan(plan=plan, tables=tables, is_mixed=is_mixed)

    def execute(self, prepared: PreparedPlan) -> ModelRunnerOutput:
        plan = prepared.plan
        for source, destination in plan.block_copies:
            self.slots[destination] = list(self.slots[source])
        self.num_copies += len(plan.block_copies)
        token_ids = self._execute_step(plan.scheduled, prepared.tables, prepared.is_mixed)
        kept = list(range(len(plan.scheduled)))
        for number in range(1, plan.num_steps):
            plan = later_step(plan, number)
            kept = [kept[entry.source] for entry in plan.scheduled]
            tables = [prepared.tables[place] for place in kept]
            token_ids += self._execute_step(plan.scheduled, tables, [prepared.is_mixed[place] for place in kept])
        return ModelRunnerOutput(
            token_ids=token_ids, logprobs=[-0.5] * len(token_ids), policy_version=self.policy_version
        )

    def _execute_step(
        self, entries: Sequence[ScheduledRequest], tables: list[list[int]], is_mixed: list[bool]
    ) -> list[int]:
        prefixes = [prefix_hashes(tokens_up_to(entry.request, entry.end)) for entry in entries]
        for entry, table, own in zip(entries, tables, prefixes, strict=True):
            self._store(table, own, entry.start)
        token_ids = []
        for entry, table, own, mixed in zip(entries, tables, prefixes, is_mixed, strict=True):
            self._attend(entry.request, table, own, mixed)
            for sample in entry.samples:
                token_ids.append(self.draw(own[-1], sample))
                sample.note_drawn(entry.completion_position, token_ids[-1])
        return token_ids

    def draw(self, prefix: int, sample: Request) -> int:
        if self.override is not None:
            return self.override(sample)
        generator = random.Random(hash((prefix, sample.seed, sample.index)))
        return EOS if generator.random() < self.eos_rate else generator.randrange(1, self.vocab_size)

    def _check_own_blocks(self, entry: ScheduledRequest) -> None:
        request, size = entry.request, self.pool.block_size
        for block in range(entry.start // size, (entry.end + entry.num_steps - 2) // size + 1):
            # a block that this step fills may have been hit by a request behind this one, and a forked prompt is shared
            is_being_filled = block < len(request.block_hashes) or len(entry.samples) > 1
            assert self.pool.ref_count(request.block_ids[block]) == 1 or is_being_filled, "a shared block is written"

    def _store(self, table: list[int], prefixes: list[int], start: int) -> None:
        for position in range(start, len(prefixes)):
            block, slot = divmod(position, self.pool.block_size)
            self.slots[table[block]][slot] = (prefixes[position], self.weights)

    def _attend(self, request: Request, table: list[int], prefixes: list[int], is_mixed: bool) -> None:
        """Every slot up to here must hold this request's own prefix, stored by the weights of today."""
        for position, expected in enumerate(prefixes):
            block, slot = divmod(position, self.pool.block_size)
            stored, weights = self.slots[table[block]][slot]
            assert stored == expected, f"{request}: position {position} holds something else"
            assert weights == self.weights or is_mixed, f"{request}: position {position} is stale"


def tokens_up_to(request: Request, end: int) -> list[int]:
    if end <= request.num_prompt_tokens:
        return request.prompt_token_ids[:end]
    return request.tokens_before(end - request.num_prompt_tokens)


def prefix_hashes(token_ids: Sequence[int]) -> list[int]:
    hashes, parent = [], 17
    for token_id in token_ids:
        parent = hash((parent, token_id))
        hashes.append(parent)
    return hashes


class Engine:
    """A scheduler and a fake runner; every step ends in an integrity check."""

    def __init__(
        self,
        limits: Limits | None = None,
        num_blocks: int = 64,
        block_size: int = BLOCK_SIZE,
        enable_prefix_caching: bool = True,
        depth: int = 1,
        **runner_options: float,
    ) -> None:
        self.pool = BlockPool(num_blocks, block_size, enable_prefix_caching)
        self.runner = FakeRunner(self.pool, **runner_options)
        self.scheduler = Scheduler(limits or Limits(), self.pool, b"v0")
        self.finished: list[Completion] = []
        self.plans: list[list[tuple[str, int, int]]] = []  # per step: request id, start, num_tokens
        self.depth = depth  # steps planned before the oldest of them runs
        self.under_way: deque[tuple[SchedulerOutput, PreparedPlan]] = deque()

    def add(self, name: str, prompt: Sequence[int] | int, *, priority: int = 0, salt: str = "", **params) -> Request:
        """Queues a request; a prompt given as a number is that many tokens nobody else has."""
        if isinstance(prompt, int):
            prompt = [1000 + hash_of_name(name) * 1000 + position for position in range(prompt)]
        leader = Request.create_group(
            request_id=name,
            prompt_token_ids=prompt,
            params=SamplingParams(**params),
            seed=hash_of_name(name),
            priority=priority,
            cache_salt=salt,
            eos_token_ids=[EOS],
            tokenizer=Characters(),
        )
        self.scheduler.add(leader)
        return leader

    def step(self, draw: Callable[[Request], int] | None = None) -> StepOutput:
        """Plans ahead, then runs the oldest step; `draw(sample)` overrides the tokens drawn."""
        while len(self.under_way) < self.depth:
            plan = self.scheduler.schedule()
            if plan.is_empty:
                break
            self.launch(plan)
        return self.take_in(draw)

    def launch(self, plan: SchedulerOutput) -> None:
        self.plans.append([(e.request.request_id, e.start, e.num_tokens) for e in plan.scheduled])
        self.under_way.append((plan, self.runner.prepare(plan)))
        self.scheduler.check_integrity()

    def take_in(self, draw: Callable[[Request], int] | None = None) -> StepOutput:
        """Runs the oldest step under way and takes its output in."""
        if not self.under_way:
            return StepOutput()
        plan, prepared = self.under_way.popleft()
        self.runner.override = draw
        step = self.scheduler.update_from_output(plan, self.runner.execute(prepared))
        self.finished += step.finished
        self.scheduler.check_integrity()
        return step

    def settle(self) -> None:
        """Takes in all steps under way."""
        while self.under_way:
            self.take_in()

    def run_until_preemption(self) -> None:
        while not self.scheduler.num_preemptions:
            assert self.scheduler.has_unfinished(), "everybody finished and nobody was preempted"
            self.step(never_stop)

    def drain(self) -> list[Completion]:
        while self.scheduler.has_unfinished():
            self.step()
        self.settle()
        assert self.pool.num_free_blocks == self.pool.num_blocks
        return self.finished

    def set_weights(self, checksum: bytes, mode: str) -> int:
        self.settle()
        self.runner.weights = checksum
        self.runner.policy_version += 1
        num_dropped = self.scheduler.set_weights(checksum, mode)
        self.scheduler.check_integrity()
        return num_dropped

    def running(self) -> list[tuple[str, int]]:
        return [(request.request_id, request.index) for request in self.scheduler.running]

    def waiting(self) -> list[tuple[str, int]]:
        return [(request.request_id, request.index) for request in self.scheduler.waiting]


def hash_of_name(name: str) -> int:
    return int.from_bytes(name.encode(), "big") % 100_003


def results(completions: Sequence[Completion]) -> dict[tuple[str, int], tuple]:
    return {(c.request_id, c.index): (c.token_ids, c.finish_reason, c.stop_reason) for c in completions}


def never_stop(sample: Request) -> int:
    return 7 + sample.index
