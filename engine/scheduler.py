"""Scheduler: decides how many tokens of which request run in the next step, and takes in what the step gave.

There is no prefill and no decode: every request's `num_computed_tokens` chases its `num_tokens`, and one token budget
is dealt out each step, to running requests first and then to waiting ones. Both queues are kept in one order
(priority, arrival, sample). So when blocks run out the victim is always the tail of the running requests, which the
step has not reached yet, and the first of them always goes on: nothing starves and nothing deadlocks.

A step may be planned while the one before runs. Tokens that it draws are pending then: counted, but not known. A
request goes on from its pending token, which the model runner fills in; whoever turns out to have stopped drew a token
too many, which is dropped. Steps run in the order of their plans, so blocks may change hands while a step still uses
them.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from operator import attrgetter
from time import monotonic
from typing import Literal, Protocol

from engine.admission import check_can_be_served
from engine.block_pool import BlockPool
from engine.kv_cache_manager import KVCacheManager
from engine.outputs import Completion, EngineStats, NewToken, StepOutput, TokenDetail
from engine.request import Request, RequestStatus
from engine.step_plan import ModelRunnerOutput, ScheduledRequest, SchedulerOutput
from engine.timing import RequestTotals, StepSeconds, note_scheduled

_order = attrgetter("order")


class SchedulerConfig(Protocol):
    """The part of EngineConfig that the scheduler reads; `max_model_len` is resolved to a number."""

    @property
    def max_num_seqs(self) -> int: ...
    @property
    def max_num_batched_tokens(self) -> int: ...
    @property
    def long_prefill_token_threshold(self) -> int: ...
    @property
    def max_model_len(self) -> int | None: ...
    @property
    def num_scheduler_steps(self) -> int: ...


MAX_STEPS_UNDER_WAY = 2

Admission = Literal["all", "started"]
"""Who may leave the queue: anyone, or only those that have run before."""


@dataclass(slots=True)
class _Plan:
    """A step being put together."""

    token_budget: int
    num_steps: int = 1
    scheduled: list[ScheduledRequest] = field(default_factory=list)
    block_copies: list[tuple[int, int]] = field(default_factory=list)
    num_promised_blocks: int = 0  # that the scheduled requests still need before all of them decode
    time: float = field(default_factory=monotonic)


class Scheduler:
    """Owns every unfinished request. A step is `schedule()`, its execution, `update_from_output()`."""

    def __init__(self, config: SchedulerConfig, block_pool: BlockPool, weights_checksum: bytes = b"") -> None:
        assert config.max_model_len is not None, "max_model_len must be resolved before the scheduler is built"
        self.block_pool = block_pool
        self.kv_cache = KVCacheManager(block_pool, weights_checksum)
        self.max_model_len = config.max_model_len
        self.max_num_seqs = config.max_num_seqs
        self.max_num_batched_tokens = config.max_num_batched_tokens
        self.max_tokens_per_request = config.long_prefill_token_threshold or config.max_num_batched_tokens
        self.max_steps = config.num_scheduler_steps
        self.admission: Admission = "all"
        self.running: list[Request] = []
        self.waiting: list[Request] = []
        self.num_preemptions = 0
        self.num_steps = 0
        self.num_scheduled_tokens = 0
        self.num_generated_tokens = 0
        self.prefix_cache_queries = 0
        self.prefix_cache_hits = 0
        self.request_totals = RequestTotals()
        self._unfinished: dict[str, list[Request]] = {}
        self._num_seats_taken = 0
        self._num_arrivals = 0
        self._num_steps_under_way = 0

    # Requests come and go

    def add(self, leader: Request, *more: Request) -> None:
        """Queues a request with all its samples. `more`: those of them that go on from tokens of their own.

        Raises:
            ValueError: for an id in use, or a request that could never be served however long it waited.
        """
        self._check_id(leader.request_id)
        check_can_be_served(leader, self.block_pool, max_model_len=self.max_model_len, max_num_seqs=self.max_num_seqs)
        samples = [sample for entry in (leader, *more) for sample in (entry, *entry.siblings)]
        for sample in samples:
            sample.arrival = self._num_arrivals
        self._num_arrivals += 1
        self._unfinished[leader.request_id] = samples
        for entry in (leader, *more):
            insort(self.waiting, entry, key=_order)

    def _check_id(self, name: str) -> None:
        if name in self._unfinished:
            raise ValueError(f"request id {name!r} is in use by an unfinished request; give every request its own id")

    def has_unfinished(self) -> bool:
        return bool(self._unfinished)

    def unfinished_ids(self) -> set[str]:
        return set(self._unfinished)

    def started_requests(self) -> list[str]:
        """Ids of the unfinished requests of which a sample has begun to run."""
        return [name for name, samples in self._unfinished.items() if any(sample.has_started for sample in samples)]

    def abort(self, request_ids: Iterable[str]) -> list[Completion]:
        """Ends every unfinished sample of these requests; they come back with what they have, in order of arrival.

        Raises:
            ValueError: naming the ids that are unknown or finished; nothing is aborted then.
        """
        request_ids = set(request_ids)
        unknown = sorted(request_ids - self._unfinished.keys())
        if unknown:
            raise ValueError(f"cannot abort {unknown}: not the ids of unfinished requests")
        samples = sorted((sample for name in request_ids for sample in self._unfinished[name]), key=_order)
        for sample in samples:
            sample.finish_reason = "abort"
            self._finish(sample)
        self._drop_finished()
        now = monotonic()
        completions = [sample.to_completion(now) for sample in samples]
        self.request_totals.add(completions)
        return completions

    def partial_completions(self) -> list[Completion]:
        """What the unfinished samples have so far, those without a token left out, in order of arrival."""
        now = monotonic()
        samples = [sample for samples in self._unfinished.values() for sample in samples if sample.num_output_tokens]
        return [sample.to_partial(now) for sample in samples]

    def set_weights(self, checksum: bytes, mode: Literal["recompute", "keep"]) -> int:
        """New weights are in place. Returns how many stored tokens of running requests were dropped.

        `recompute`: the running requests keep their tokens, drop their blocks and wait again, in the order they had.
        `keep`: they go on with blocks of the old weights, which are never shared again; the tokens drawn from now on
        are marked inexact.
        """
        assert not self._num_steps_under_way, "weights may change only between two steps"
        if mode not in ("recompute", "keep"):
            raise ValueError(f"mode={mode!r} must be 'recompute' or 'keep'")
        self.kv_cache.weights_checksum = checksum
        num_dropped_tokens = self._requeue_running() if mode == "recompute" else 0
        for samples in self._unfinished.values():
            for sample in samples:
                sample.block_hashes.clear()
        for request in self.running:
            request.has_mixed_kv = True
        return num_dropped_tokens

    def abandon_steps(self) -> None:
        """A step under way failed: nobody knows which blocks it and later ones wrote, so none is used again."""
        for samples in self._unfinished.values():
            for sample in samples:
                sample.forget_pending()
        self._requeue_running()
        self.block_pool.reset_prefix_cache()
        self._num_steps_under_way = 0

    def reset_prefix_cache(self, preempt_running: bool = False) -> bool:
        """Forgets what blocks contain; whether nothing of it is left in use.

        preempt_running: running requests give back their blocks too and wait again, in the order they had.
        """
        assert not self._num_steps_under_way, "the prefix cache may be reset only between two steps"
        if preempt_running:
            self._requeue_running()
        self.block_pool.reset_prefix_cache()
        return not self.running

    # A step

    def schedule(self) -> SchedulerOutput:
        """Plans the next step, which may be while one runs. Empty only where nothing can go on before a step under way
        has been taken in, no request is unfinished, or none is admitted.
        """
        assert self._num_steps_under_way < MAX_STEPS_UNDER_WAY, "the oldest step's output has not been taken in"
        plan = _Plan(self.max_num_batched_tokens, self._num_steps_of_cycle())
        num_preemptions = self.num_preemptions
        self._schedule_running(plan)
        if self.num_preemptions == num_preemptions:
            self._schedule_waiting(plan)
        assert plan.scheduled or self._may_be_empty(), "requests are unfinished but none can be scheduled"
        return self._launch(plan)

    def update_from_output(self, scheduled: SchedulerOutput, output: ModelRunnerOutput) -> StepOutput:
        """Appends the tokens that the oldest step under way has drawn, and ends whoever reached a stop.

        What is drawn for a sample that has ended meanwhile is dropped.
        """
        num_drawn = sum([len(entry.samples) * entry.num_steps for entry in scheduled.scheduled])
        assert num_drawn == len(output.token_ids) == len(output.logprobs), "not one token for each sample and step"
        drawn = zip(output.token_ids, output.logprobs, output.details or itertools.repeat(None), strict=False)
        policy_version = output.policy_version
        self._num_steps_under_way -= 1
        for rows in output.prompt_logprobs:
            rows.deliver()
        step = StepOutput()
        for number in range(scheduled.num_steps):
            for entry in scheduled.scheduled:
                if number < entry.num_steps:
                    for sample in entry.samples:
                        token_id, logprob, detail = next(drawn)
                        sample.num_pending_tokens -= 1
                        if sample.status is not RequestStatus.FINISHED:  # else stopped or aborted meanwhile
                            self._take_token(sample, token_id, logprob, policy_version, detail, step)
        self.num_generated_tokens += len(step.new_tokens)
        if step.finished:
            self._drop_finished()
            self.request_totals.add(step.finished)
        return step

    def stats(self, policy_version: int = 0, step_seconds: StepSeconds | None = None) -> EngineStats:
        pool = self.block_pool
        queries = self.prefix_cache_queries
        return EngineStats(
            num_requests_running=self._num_seats_taken,
            num_requests_waiting=sum(request.num_seats for request in self.waiting),
            num_blocks=pool.num_blocks,
            num_free_blocks=pool.num_free_blocks,
            kv_cache_usage=pool.usage,
            num_preemptions=self.num_preemptions,
            prefix_cache_queries=queries,
            prefix_cache_hits=self.prefix_cache_hits,
            prefix_cache_hit_rate=self.prefix_cache_hits / queries if queries else 0.0,
            num_steps=self.num_steps,
            num_scheduled_tokens=self.num_scheduled_tokens,
            num_generated_tokens=self.num_generated_tokens,
            num_evictions=pool.num_evictions,
            requests=self.request_totals.snapshot(),
            step_seconds=step_seconds or StepSeconds(),
            policy_version=policy_version,
        )

    # Planning

    def _schedule_running(self, plan: _Plan) -> None:
        running = self.running
        position = 0
        while position < len(running) and plan.token_budget > 0:
            request = running[position]
            num_tokens = self._share(request, plan)
            if num_tokens:
                num_steps = self._num_steps_of(request, plan) if plan.num_steps > 1 else 1
                if not self._make_room(request, num_tokens + num_steps - 1, plan):
                    return  # it was the tail itself
                self._plan(request, num_tokens, plan, num_steps)
            position += 1

    def _schedule_waiting(self, plan: _Plan) -> None:
        """Admits from the head of the queue only: who does not fit is waited for, so nobody is overtaken for ever."""
        place = 0
        while place < len(self.waiting) and plan.token_budget > 0:
            request = self.waiting[place]
            if self.admission == "started" and not request.has_started:
                place += 1
                continue
            if not self._has_seats_for(request) or request.num_pending_tokens:
                return
            cached_block_ids = self.kv_cache.find_cached_blocks(request)
            if not self._can_admit(request, cached_block_ids, plan):
                return
            self._admit(place, cached_block_ids)
            note_scheduled(request, plan.time)
            num_tokens = self._share(request, plan)
            self.kv_cache.extend(request, request.num_computed_tokens + num_tokens)
            self._plan(request, num_tokens, plan)

    def _has_seats_for(self, request: Request) -> bool:
        return self._num_seats_taken + request.num_seats <= self.max_num_seqs

    def _num_steps_of_cycle(self) -> int:
        """Several where all decode and nobody could begin; else one."""
        if self.max_steps == 1 or (self.waiting and self._has_seats_for(self.waiting[0])):
            return 1
        all_decode = all(request.num_missing_tokens == 1 and not request.siblings for request in self.running)
        return self.max_steps if all_decode else 1

    def _num_steps_of(self, request: Request, plan: _Plan) -> int:
        """Its steps of the cycle: none beyond the tokens it may have."""
        num_tokens = len(request.token_ids) + request.num_pending_tokens
        num_left = min(request.num_prompt_tokens + request.params.max_tokens, self.max_model_len) - num_tokens
        return min(plan.num_steps, num_left)

    def _may_be_empty(self) -> bool:
        return bool(self._num_steps_under_way) or not self._unfinished or self.admission != "all"

    def _share(self, request: Request, plan: _Plan) -> int:
        """Tokens that it computes in this step: none where those under way will end it."""
        if request.num_pending_tokens and request.ends_with_pending(self.max_model_len):
            return 0
        num_missing_tokens = request.num_missing_tokens
        if num_missing_tokens == 1:
            return 1
        return min(num_missing_tokens, self.max_tokens_per_request, plan.token_budget)

    def _plan(self, request: Request, num_tokens: int, plan: _Plan, num_steps: int = 1) -> None:
        start, num_known_tokens = request.num_computed_tokens, len(request.token_ids)
        end = start + num_tokens
        is_complete = num_tokens == request.num_missing_tokens
        samples = (request, *request.siblings) if is_complete else ()
        source = request.draw_place if end > num_known_tokens else -1
        plan.scheduled.append(ScheduledRequest(request, start, num_tokens, samples, source, num_steps))
        plan.token_budget -= num_tokens
        if not is_complete or request.siblings:
            plan.num_promised_blocks += self._num_promised_blocks(request)
        request.num_computed_tokens = end + num_steps - 1
        for sample in samples:
            sample.num_pending_tokens += num_steps
        self.kv_cache.register_full_blocks(request, start, min(end, num_known_tokens))

    def _launch(self, plan: _Plan) -> SchedulerOutput:
        """Counts the step as under way; groups whose prompt it completes fork."""
        number = self.num_steps + 1
        num_scheduled_tokens = self.max_num_batched_tokens - plan.token_budget
        num_steps = max([entry.num_steps for entry in plan.scheduled], default=1) if plan.num_steps > 1 else 1
        self.num_steps += num_steps if plan.scheduled else 0
        self.num_scheduled_tokens += num_scheduled_tokens
        if num_steps > 1:
            self.num_scheduled_tokens += sum([entry.num_steps - 1 for entry in plan.scheduled])
        self._num_steps_under_way += bool(plan.scheduled)
        place = 0
        for entry in plan.scheduled:
            for sample in entry.samples:
                sample.draw_place = place
                place += 1
            if len(entry.samples) > 1:
                self._fork(entry.request)
        return SchedulerOutput(
            scheduled=plan.scheduled,
            block_copies=plan.block_copies,
            num_scheduled_tokens=num_scheduled_tokens,
            num_steps=num_steps,
            number=number,
        )

    def _make_room(self, request: Request, num_tokens: int, plan: _Plan) -> bool:
        """Blocks for a running request's next tokens, taken from the tail if they must be; False if it was the tail."""
        end = request.num_computed_tokens + num_tokens
        if self.kv_cache.has_blocks(request, end):
            return True
        while not self.kv_cache.has_room(request, end):
            if self._preempt_tail() is request:
                return False
        plan.block_copies += self.kv_cache.extend(request, end)
        return True

    def _num_promised_blocks(self, request: Request) -> int:
        """Blocks it needs before all its samples decode: those of its known tokens, and one for each other sample."""
        return self.kv_cache.num_blocks(len(request.token_ids)) - len(request.block_ids) + len(request.siblings)

    # Admission and preemption

    def _can_admit(self, request: Request, cached_block_ids: list[int], plan: _Plan) -> bool:
        """Whether all its tokens fit now, beside what running requests were promised; changes nothing.

        A cached block that is free leaves the free queue too, so it saves computation but no block. While others run,
        each of them must also find one more block afterwards: whoever is admitted into the last blocks is preempted
        as soon as the others grow, and its prompt computed again.
        """
        pool = self.block_pool
        num_needed = self.kv_cache.num_blocks(len(request.token_ids)) - len(cached_block_ids)
        num_needed += sum([pool.ref_count(block_id) == 0 for block_id in cached_block_ids])
        if self.running:
            num_needed += plan.num_promised_blocks + len(request.siblings) + len(self.running)
        return num_needed <= pool.num_free_blocks

    def _admit(self, place: int, cached_block_ids: list[int]) -> None:
        request = self.waiting.pop(place)
        assert request.num_computed_tokens == 0, f"{request} waits but has computed tokens"
        self.kv_cache.adopt(request, cached_block_ids)
        request.status = RequestStatus.RUNNING
        insort(self.running, request, key=_order)
        self._num_seats_taken += request.num_seats
        self.prefix_cache_queries += len(request.token_ids)
        self.prefix_cache_hits += request.num_cached_tokens

    def _preempt_tail(self) -> Request:
        victim = self.running.pop()
        if victim.num_pending_tokens and victim.has_mixed_kv:
            victim.is_exact = False  # its token under way is drawn on old keys and values
        self._release(victim)
        victim.status = RequestStatus.PREEMPTED
        victim.num_preemptions += 1
        self.num_preemptions += 1
        insort(self.waiting, victim, key=_order)
        return victim

    def _requeue_running(self) -> int:
        """Everybody running waits again, at the place in the queue that was theirs; returns the tokens dropped."""
        num_dropped_tokens = sum(request.num_computed_tokens for request in self.running)
        for request in self.running:
            self._release(request)
            request.status = RequestStatus.WAITING
        self.waiting = sorted(self.running + self.waiting, key=_order)
        self.running = []
        return num_dropped_tokens

    def _release(self, request: Request) -> None:
        """Gives back blocks and seats of a running request; its tokens stay."""
        self.kv_cache.release(request)
        self._num_seats_taken -= request.num_seats

    # Taking in a step

    def _fork(self, leader: Request) -> None:
        """The prompt is complete: its samples share the leader's blocks from here on, and part when they write."""
        siblings, leader.siblings = leader.siblings, ()
        for sibling in siblings:
            self.kv_cache.share(leader, sibling)
            sibling.status = RequestStatus.RUNNING
        place = bisect_left(self.running, leader.order, key=_order) + 1
        self.running[place:place] = siblings

    def _take_token(
        self,
        sample: Request,
        token_id: int,
        logprob: float,
        policy_version: int,
        detail: TokenDetail | None,
        step: StepOutput,
    ) -> None:
        sample.append_token(token_id, logprob, policy_version, detail)
        step.new_tokens.append(NewToken(sample.request_id, sample.index, token_id, logprob, policy_version))
        if sample.stamps.first_token is None:
            sample.stamps.note_first_token(step.time, sample.num_output_tokens)
        if sample.check_stop(self.max_model_len):
            self._finish(sample)
            step.finished.append(sample.to_completion(step.time))
        elif sample.num_pending_tokens:
            self._register_known_block(sample)

    def _register_known_block(self, sample: Request) -> None:
        """A block that was filled by a token not yet known then can be found from now on."""
        num_tokens = len(sample.token_ids)
        if num_tokens % self.block_pool.block_size == 0 and num_tokens <= sample.num_computed_tokens:
            self.kv_cache.register_full_blocks(sample, num_tokens - 1, num_tokens)

    def _finish(self, sample: Request) -> None:
        if sample.status is RequestStatus.RUNNING:
            self._release(sample)
        sample.status = RequestStatus.FINISHED
        sample.siblings = ()
        samples = self._unfinished[sample.request_id]
        samples.remove(sample)
        if not samples:
            del self._unfinished[sample.request_id]

    def _drop_finished(self) -> None:
        """Takes the finished out of both queues, once for all of them."""
        self.running = [request for request in self.running if request.status is not RequestStatus.FINISHED]
        self.waiting = [request for request in self.waiting if request.status is not RequestStatus.FINISHED]

    # Proof

    def check_integrity(self) -> None:
        """Asserts that queues, seats, tokens and blocks add up; between two steps and within one."""
        self.block_pool.check_integrity([request.block_ids for request in self.running])
        queued = [sample for request in self.running + self.waiting for sample in (request, *request.siblings)]
        unfinished = [sample for samples in self._unfinished.values() for sample in samples]
        assert len(queued) == len(unfinished), "a sample is lost or queued twice"
        assert {id(sample) for sample in queued} == {id(sample) for sample in unfinished}, "a sample is lost"
        assert self._num_seats_taken == sum(request.num_seats for request in self.running) <= self.max_num_seqs
        for queue in (self.running, self.waiting):
            assert queue == sorted(queue, key=_order), "a queue is out of order"
        for request in self.running:
            self._check_running(request)
        for request in self.waiting:
            assert request.status in (RequestStatus.WAITING, RequestStatus.PREEMPTED), f"{request} is queued"
            assert not request.block_ids, f"{request} waits but holds blocks"
            assert request.num_computed_tokens == 0, f"{request} waits but has computed tokens"

    def _check_running(self, request: Request) -> None:
        num_tokens, num_computed_tokens = len(request.token_ids), request.num_computed_tokens
        assert request.status is RequestStatus.RUNNING, f"{request} is among the running"
        assert num_tokens < self.max_model_len, f"{request}: lengths"
        assert 0 <= request.num_pending_tokens <= MAX_STEPS_UNDER_WAY * self.max_steps, f"{request}: pending tokens"
        assert self._num_steps_under_way or not request.num_pending_tokens, f"{request} waits for a token of no step"
        assert request.num_missing_tokens > 0, f"{request} has nothing to compute"
        assert len(request.block_ids) == self.kv_cache.num_blocks(num_computed_tokens), f"{request}: blocks"
        assert request.num_output_tokens == len(request.logprobs) == len(request.policy_versions), f"{request}: output"
