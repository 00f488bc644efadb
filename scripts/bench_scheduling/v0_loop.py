"""V0Loop: the loop of vLLM V0 (0.8.5, defaults) on Lockstep's own runner and kernels, to compare with.

As it was there: one step at a time, and nothing is planned while it runs. A step computes either whole prompts, which
go first, or one token of everybody who runs. Each sample of a group is a sequence of its own, with its own blocks and
its own prompt to compute; no block is looked up. What it shares with the engine is all that costs time elsewhere:
packing, recorded steps, kernels, sampling, requests and their stop rules. So a difference in speed is one of the loop.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from engine import EngineConfig, SamplingParams
from engine.block_pool import BlockPool
from engine.kv_cache_manager import KVCacheManager
from engine.outputs import NewToken, StepOutput
from engine.pipeline import Runner
from engine.prompts import derive_seed
from engine.request import Request, RequestStatus
from engine.step_plan import ModelRunnerOutput, ScheduledRequest, SchedulerOutput

WATERMARK = 0.01  # share of the blocks that stays free when a prompt is admitted, for those who run


class V0Scheduler:
    """Prompts first, whole; then decode steps of all who run, the last of whom gives way when blocks run out."""

    def __init__(self, config: EngineConfig, block_pool: BlockPool) -> None:
        """config: with max_model_len resolved. Raises ValueError where a whole prompt may be more than a step takes."""
        assert config.max_model_len is not None, "max_model_len must be resolved before the scheduler is built"
        if config.max_num_batched_tokens < config.max_model_len:
            raise ValueError(
                f"max_num_batched_tokens={config.max_num_batched_tokens} is less than "
                f"max_model_len={config.max_model_len}: without chunks a step must hold the longest prompt, so raise it"
            )
        self.block_pool, self.kv_cache = block_pool, KVCacheManager(block_pool, weights_checksum=b"")
        self.max_num_seqs, self.max_num_batched_tokens = config.max_num_seqs, config.max_num_batched_tokens
        self.max_model_len = config.max_model_len
        self.num_watermark_blocks = int(WATERMARK * block_pool.num_blocks)
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()
        self.num_steps = 0

    def add(self, leader: Request) -> None:
        """Queues every sample for itself. Raises ValueError for a request that could never run."""
        num_tokens = min(leader.num_prompt_tokens + leader.params.max_tokens, self.max_model_len)
        num_blocks, most = self.kv_cache.num_blocks(num_tokens), self.block_pool.num_blocks - self.num_watermark_blocks
        if leader.num_prompt_tokens >= self.max_model_len or num_blocks > most:
            raise ValueError(
                f"request {leader.request_id!r} of {num_tokens} tokens can never run: max_model_len="
                f"{self.max_model_len}, and {most} blocks of {self.block_pool.block_size} tokens may be used"
            )
        siblings, leader.siblings = leader.siblings, ()
        self.waiting.extend((leader, *siblings))

    def has_unfinished(self) -> bool:
        return bool(self.waiting or self.running)

    def schedule(self) -> SchedulerOutput:
        """The next step: of prompts where one can start, else of everybody's next token."""
        self.num_steps += 1
        return self._plan(self._schedule_prompts() or self._schedule_decodes())

    def update_from_output(self, plan: SchedulerOutput, output: ModelRunnerOutput) -> StepOutput:
        """Appends a token to every request of the step and ends whoever reached a stop."""
        step, version = StepOutput(), output.policy_version
        for entry, token_id, logprob in zip(plan.scheduled, output.token_ids, output.logprobs, strict=True):
            request = entry.request
            request.append_token(token_id, logprob, version)
            step.new_tokens.append(NewToken(request.request_id, request.index, token_id, logprob, version))
            if request.check_stop(self.max_model_len):
                self.kv_cache.release(request)
                request.status = RequestStatus.FINISHED
                step.finished.append(request.to_completion(step.time))
        if step.finished:
            self.running = deque(one for one in self.running if one.status is not RequestStatus.FINISHED)
        return step

    def _schedule_prompts(self) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        token_budget = self.max_num_batched_tokens
        while self.waiting and len(self.running) < self.max_num_seqs:
            request, num_tokens = self.waiting[0], self.waiting[0].num_tokens
            if num_tokens > token_budget or not self._can_start(num_tokens):
                break
            self.running.append(self.waiting.popleft())
            request.status = RequestStatus.RUNNING
            self.kv_cache.extend(request, num_tokens)
            scheduled.append(self._entry(request))
            token_budget -= num_tokens
        return scheduled

    def _schedule_decodes(self) -> list[ScheduledRequest]:
        scheduled: list[ScheduledRequest] = []
        queue, self.running = self.running, deque()
        while queue:
            request = queue.popleft()
            while not self.kv_cache.has_room(request, request.num_tokens):
                self._preempt(queue.pop() if queue else request)
                if request.status is RequestStatus.PREEMPTED:
                    return scheduled
            self.kv_cache.extend(request, request.num_tokens)
            self.running.append(request)
            scheduled.append(self._entry(request))
        return scheduled

    def _can_start(self, num_tokens: int) -> bool:
        num_left = self.block_pool.num_free_blocks - self.kv_cache.num_blocks(num_tokens)
        return num_left >= self.num_watermark_blocks

    def _preempt(self, request: Request) -> None:
        """Its blocks go, its tokens stay: they are a prompt to compute again, before all that wait."""
        self.kv_cache.release(request)
        request.status = RequestStatus.PREEMPTED
        request.num_preemptions += 1
        self.waiting.appendleft(request)

    def _entry(self, request: Request) -> ScheduledRequest:
        start = request.num_computed_tokens
        request.num_computed_tokens = request.num_tokens
        return ScheduledRequest(request, start, request.num_tokens - start, (request,))

    def _plan(self, scheduled: list[ScheduledRequest]) -> SchedulerOutput:
        num_tokens = sum([entry.num_tokens for entry in scheduled])
        return SchedulerOutput(scheduled=scheduled, block_copies=[], num_scheduled_tokens=num_tokens)


class V0Loop:
    """As much of LLMEngine's surface as a benchmark uses: prompts are token ids, and there is no text."""

    def __init__(self, runner: Runner, config: EngineConfig, num_blocks: int, **of_model: Any) -> None:
        """of_model: eos_token_ids and vocab_size, for `Request.create_group`."""
        self.runner, self.seed, self.of_model = runner, config.seed, of_model
        self.scheduler = V0Scheduler(config, BlockPool(num_blocks, config.block_size, enable_prefix_caching=False))

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> None:
        seed = derive_seed(self.seed, request_id) if params.seed is None else params.seed
        group = Request.create_group(
            request_id=request_id, prompt_token_ids=prompt, params=params, seed=seed, **self.of_model
        )
        self.scheduler.add(group)

    def step(self) -> StepOutput:
        """Plans a step, runs it, and takes in what it gave."""
        plan = self.scheduler.schedule()
        output = self.runner.execute(self.runner.prepare(plan))
        return self.scheduler.update_from_output(plan, output)

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()
