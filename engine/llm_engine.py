"""LLMEngine: one model on one device, stepped by its owner; requests in, completions out."""

from __future__ import annotations

import contextlib
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import kernels
from engine.block_pool import BlockPool
from engine.checkpoint import iter_weights, resolve_model
from engine.config import EngineConfig
from engine.memory import resolve_num_blocks
from engine.model import NamedTensors
from engine.model_config import ModelConfig
from engine.model_runner import ModelRunner
from engine.ops import Ops, make_ops
from engine.outputs import Completion, EngineStats, StepOutput, UpdateMode, WeightUpdate
from engine.pipeline import Pipeline, Runner
from engine.prompts import as_prompts, derive_seed, per_prompt_params
from engine.request import Request
from engine.resume import resumed_entries
from engine.sampling_params import SamplingParams
from engine.scheduler import MAX_STEPS_UNDER_WAY, Scheduler
from engine.timing import StepClock
from engine.tokenizer import Prompt, encode, load_tokenizer
from engine.trace import Trace, trace_file

MAX_POLICY_VERSION = 2**31 - 1

PauseMode = Literal["keep", "wait", "abort"]


class LLMEngine:
    """A deterministic inference engine.

    For given weights, a completion's tokens and log-probabilities depend on its prompt, sampling parameters, seed and
    index alone: not on what else runs, chunk boundaries, cache hits, preemption or threads.

    Attributes:
        model_config, tokenizer (None where the model has none), max_model_len.
        policy_version: of the weights in force; 0 for those the model was loaded with.
        weights_checksum: 16 bytes that name the weights themselves.
        kernel_fingerprint: what fixes the bits; equal on engine and trainer, or they are not in lockstep.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        make_weights: Callable[[Mapping[str, tuple[int, ...]]], NamedTensors] | None = None,
        ops: Ops | None = None,
        runner: Runner | None = None,
    ) -> None:
        """make_weights: gives weights for their shapes by name, instead of those in the model's directory, which then
        needs no more than a config.json. ops: instead of those of device and profile, to compare with them. runner:
        carries out the steps instead of the model runner, as a stand-in for another device.
        """
        self._trace_file = trace_file(config.trace_path)
        self._clock = StepClock(None if self._trace_file is None else Trace())
        kernels.set_num_threads(config.num_threads)
        if ops is None:
            ops = make_ops(config.numerics, config.device)
        self.kernel_fingerprint: str = ops.fingerprint()
        directory = resolve_model(config.model)
        self.model_config = ModelConfig.from_directory(directory)
        self.tokenizer = load_tokenizer(directory)
        self.max_model_len = config.resolve_max_model_len(self.model_config)
        num_blocks = resolve_num_blocks(config, self.model_config, self.max_model_len, ops)
        self.config = replace(config, max_model_len=self.max_model_len, device=config.device_name)
        self.model_runner = ModelRunner(self.model_config, self.config, num_blocks, ops, self._clock)
        weights = iter_weights(directory) if make_weights is None else make_weights(self.weight_shapes())
        self.weights_checksum = self.model_runner.load_weights(weights, policy_version=0)
        block_pool = BlockPool(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, block_pool, self.weights_checksum)
        depth = MAX_STEPS_UNDER_WAY if self.config.is_async else 1
        self._pipeline = Pipeline(runner or self.model_runner, depth, self._clock)
        self._undelivered = StepOutput()  # of steps that were taken in between two calls of `step`
        self._paused: PauseMode | None = None
        self._is_updating = False
        self._num_calls = 0
        if self._clock.trace is not None:  # also without a call of `write_trace`, when the engine or the process ends
            weakref.finalize(self, self._clock.trace.write, self._trace_file)

    @property
    def policy_version(self) -> int:
        return self.model_runner.policy_version

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        priority: int = 0,
        resume: Completion | Sequence[Completion] | None = None,
        cache_salt: str = "",
    ) -> None:
        """Queues a prompt (text, token ids or chat messages) with `params.n` samples.

        Without `params.seed` the seed is derived from the engine's and the request id. Smaller priorities go first.
        resume: partial completions of this prompt under these parameters and this seed, to go on from; those that have
        finished are not drawn again. cache_salt: requests of different salts share no cached blocks.

        Raises:
            ValueError: for an empty or too long prompt, ids outside the vocabulary, an id in use, sampling parameters
                that this model cannot serve, a request that could never fit the KV pool, or completions to resume that
                do not fit the request (`engine.resume`).
        """
        params = params or SamplingParams()
        leader = Request.create_group(
            request_id=request_id,
            prompt_token_ids=encode(self.tokenizer, prompt, self.model_config.vocab_size),
            params=params,
            seed=derive_seed(self.config.seed, request_id) if params.seed is None else params.seed,
            priority=priority,
            cache_salt=cache_salt,
            eos_token_ids=self.model_config.eos_token_ids,
            tokenizer=self.tokenizer,
            vocab_size=self.model_config.vocab_size,
        )
        partial = [resume] if isinstance(resume, Completion) else resume or []
        self.scheduler.add(*resumed_entries(leader, partial, self.model_config.vocab_size, self.max_model_len))

    def step(self) -> StepOutput:
        """Takes in one step: what it drew, and the samples that finished with it. Without requests it does nothing.

        With asynchronous scheduling the next step has been planned by then, and runs.
        """
        self._launch_steps()
        self._take_in_step()
        return self._deliver()

    def has_unfinished(self) -> bool:
        """Whether a request is unfinished, or something finished is yet to come out of `step`."""
        return self.scheduler.has_unfinished() or bool(self._undelivered.finished)

    def can_step(self) -> bool:
        """Whether `step` has something to do: a paused engine may have unfinished requests and nothing to do."""
        if self._paused is None or not self.scheduler.has_unfinished():
            return self.has_unfinished()
        may_go_on = self._paused == "wait" and bool(self.scheduler.started_requests())
        return may_go_on or bool(self._undelivered.finished)

    def pause(self, mode: PauseMode = "keep") -> list[Completion]:
        """Stops drawing until `resume()`; requests may still be added and wait. Returns the requests that it ended.

        `keep`: requests stop where they are and keep their blocks. `wait`: those that have begun go on to their end,
        and no other begins; `can_step()` turns False when they have ended. `abort`: all end with what they have.

        Raises ValueError for another mode.
        """
        if mode not in get_args(PauseMode):
            raise ValueError(f"mode={mode!r} must be 'keep', 'wait' or 'abort'")
        self._drain()
        self._paused = mode
        self.scheduler.admission = "started" if mode == "wait" else "all"
        return self.scheduler.abort(self.scheduler.unfinished_ids()) if mode == "abort" else []

    def resume(self) -> None:
        """Goes on after `pause`; ValueError if the engine is not paused."""
        if self._paused is None:
            raise ValueError("the engine is not paused: there is nothing to resume")
        self._paused = None
        self.scheduler.admission = "all"

    @property
    def is_paused(self) -> bool:
        return self._paused is not None

    def reset_prefix_cache(self, preempt_running: bool = False) -> bool:
        """Forgets what the blocks of the KV pool contain; whether no block is left in use.

        preempt_running: running requests give back their blocks, keep their tokens and their place in the queue, and
        compute the blocks again.
        """
        self._drain()
        return self.scheduler.reset_prefix_cache(preempt_running)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        timeout: float | None = None,
    ) -> list[list[Completion]]:
        """Completions by [prompt][sample]. `params` is one for all prompts or one for each; timeout in seconds.

        Raises:
            ValueError: as `add_request`; nothing runs then.
            TimeoutError: naming how much was unfinished; those requests are aborted.
        """
        if self._paused is not None:
            raise ValueError(f"the engine is paused (mode {self._paused!r}), so nothing would come: resume() it first")
        prompts = as_prompts(prompts)
        all_params = per_prompt_params(params, len(prompts))
        self._num_calls += 1
        ids = [f"generate-{self._num_calls}-{i}" for i in range(len(prompts))]
        self._add_all(ids, prompts, all_params)
        groups: dict[str, list[Completion]] = {request_id: [] for request_id in ids}
        deadline = None if timeout is None else time.monotonic() + timeout
        num_open = sum(p.n for p in all_params)
        while num_open:
            if deadline is not None and time.monotonic() > deadline:
                unfinished = [i for i, p in zip(ids, all_params, strict=True) if len(groups[i]) < p.n]
                self.abort(unfinished)
                raise TimeoutError(f"{len(unfinished)} of {len(ids)} prompts were unfinished after {timeout} s")
            for completion in self.step().finished:
                if completion.request_id in groups:
                    groups[completion.request_id].append(completion)
                    num_open -= 1
        return [sorted(groups[request_id], key=lambda c: c.index) for request_id in ids]

    def abort(self, request_ids: Iterable[str]) -> list[Completion]:
        """Ends requests with what they have (finish_reason "abort"); ValueError names ids that are not unfinished.

        What a step under way draws for them is dropped.
        """
        ended = {completion.request_id for completion in self._undelivered.finished} - self.scheduler.unfinished_ids()
        return self.scheduler.abort(set(request_ids) - ended)

    def partial_completions(self) -> list[Completion]:
        """What unfinished requests have drawn so far, finish_reason "abort": `add_request(resume=)` goes on from them.

        Samples without a token are left out, and so is the text. The requests themselves go on here.
        """
        self._drain()
        return self.scheduler.partial_completions()

    def update_weights(
        self,
        named_tensors: NamedTensors,
        policy_version: int,
        mode: UpdateMode = "recompute",
        digests: Mapping[str, bytes] | None = None,
    ) -> WeightUpdate:
        """Replaces all weights in place, between two steps.

        `recompute`: running requests keep their tokens, drop their KV and go on under the new weights; exact.
        `keep`: they go on, on KV of the old weights; fast, and their completions say is_exact=False.
        `wait`: requests that have begun are finished first, under the old weights; `step` hands them out later. Exact.
        `abort`: requests that have begun end with what they have; `step` hands them out.
        `digests` of tensors that were verified beforehand spare reading them twice (see `Transformer.load_weights`).

        Raises:
            ValueError: for an unknown mode or version, `wait` in a paused engine, an update within another, or weights
                that `Transformer.load_weights` refuses; the engine then goes on under the old ones.
        """
        if mode not in get_args(UpdateMode):
            raise ValueError(f"mode={mode!r} must be 'recompute', 'keep', 'wait' or 'abort'")
        if self._is_updating:
            raise ValueError(
                f"policy_version={policy_version!r} cannot be taken while another update runs: its tensors come first"
            )
        if not isinstance(policy_version, int) or not 0 <= policy_version <= MAX_POLICY_VERSION:
            raise ValueError(f"policy_version={policy_version!r} must be an integer from 0 to {MAX_POLICY_VERSION}")
        self._drain()
        if mode == "wait":
            self._finish_started()
        self._is_updating = True
        try:
            self.weights_checksum = self.model_runner.load_weights(named_tensors, policy_version, digests)
        finally:
            self._is_updating = False
        if mode == "abort":
            self._undelivered.finished += self.scheduler.abort(self.scheduler.started_requests())
        num_dropped_tokens = self.scheduler.set_weights(
            self.weights_checksum, "keep" if mode == "keep" else "recompute"
        )
        return WeightUpdate(checksum=self.weights_checksum, num_recomputed_tokens=num_dropped_tokens)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by Hugging Face name: what `update_weights` must be given."""
        return self.model_runner.model.weight_shapes()

    def stats(self) -> EngineStats:
        return self.scheduler.stats(self.policy_version, self._clock.seconds())

    def write_trace(self) -> Path:
        """Writes what was recorded so far (`EngineConfig.trace_path`) and returns the file; it may be called again.

        Raises ValueError where no trace was asked for.
        """
        if self._clock.trace is None or self._trace_file is None:
            raise ValueError("nothing was recorded: give EngineConfig(trace_path=...) a file")
        self._clock.trace.write(self._trace_file)
        return self._trace_file

    def check_integrity(self) -> None:
        """Asserts that queues, references, free blocks and tables add up."""
        self.scheduler.check_integrity()

    def _launch_steps(self) -> None:
        """Plans as many steps as may be under way, and starts them."""
        if self._is_updating:
            raise ValueError("the engine cannot step while its weights change: the tensors' iterator called it")
        while self._pipeline.has_room and self._paused in (None, "wait"):
            with self._abandoning_on_failure():
                with self._clock.part("schedule") as part:
                    part.plan = plan = self.scheduler.schedule()
                if plan.is_empty:
                    return
                self._pipeline.launch(plan)

    def _take_in_step(self) -> None:
        """Waits for the oldest step under way; with the last request ended, later ones draw what is dropped."""
        if not len(self._pipeline):
            return
        with self._abandoning_on_failure():
            plan, output = self._pipeline.take()
            with self._clock.part("update", plan):
                self._undelivered.extend(self.scheduler.update_from_output(plan, output))
        if not self.scheduler.has_unfinished():
            self._drain()

    def _drain(self) -> None:
        """Takes in all steps under way: what follows happens between two steps."""
        while len(self._pipeline):
            self._take_in_step()

    def _finish_started(self) -> None:
        """Runs the requests that have begun to their end, and begins no other."""
        if self._paused is not None:
            raise ValueError(f"mode='wait' would never end: the engine is paused (mode {self._paused!r}). resume() it")
        self.scheduler.admission = "started"
        try:
            while self.scheduler.started_requests():
                self._launch_steps()
                self._take_in_step()
            self._drain()
        finally:
            self.scheduler.admission = "all"

    def _deliver(self) -> StepOutput:
        output, self._undelivered = self._undelivered, StepOutput()
        return output

    @contextlib.contextmanager
    def _abandoning_on_failure(self) -> Iterator[None]:
        """Ctrl-C too: what the steps under way had written is unknown, so none of it is used again."""
        try:
            yield
        except BaseException:
            self._pipeline.clear()
            self.scheduler.abandon_steps()
            raise

    def _add_all(self, ids: list[str], prompts: list[Prompt], all_params: list[SamplingParams]) -> None:
        for i, request_id in enumerate(ids):
            try:
                self.add_request(request_id, prompts[i], all_params[i])
            except ValueError as error:
                if i:
                    self.abort(ids[:i])
                raise ValueError(f"prompt {i}: {error}") from error
