"""LLMEngine: one model on one device, stepped by its owner; requests in, completions out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import kernels
from engine.block_pool import BlockPool
from engine.checkpoint import iter_weights, resolve_model
from engine.config import EngineConfig
from engine.memory import resolve_num_blocks
from engine.model import NamedTensors
from engine.model_config import ModelConfig
from engine.model_runner import ModelRunner
from engine.ops import Ops, make_ops
from engine.outputs import Completion, EngineStats, StepOutput, WeightUpdate
from engine.prompts import as_prompts, derive_seed, per_prompt_params
from engine.request import Request
from engine.sampling_params import SamplingParams
from engine.scheduler import Scheduler
from engine.step_plan import ModelRunnerOutput, SchedulerOutput
from engine.tokenizer import Prompt, encode, load_tokenizer

MAX_POLICY_VERSION = 2**31 - 1


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
    ) -> None:
        """make_weights: gives weights for their shapes by name, instead of those in the model's directory, which then
        needs no more than a config.json. ops: instead of those of device and profile, to compare with them.
        """
        kernels.set_num_threads(config.num_threads)
        if ops is None:
            ops = make_ops(config.profile_name, "cuda" if config.device_name == "cuda" else "cpu")
        self.kernel_fingerprint: str = ops.fingerprint()
        directory = resolve_model(config.model)
        self.model_config = ModelConfig.from_directory(directory)
        self.tokenizer = load_tokenizer(directory)
        self.max_model_len = config.resolve_max_model_len(self.model_config)
        num_blocks = resolve_num_blocks(config, self.model_config, self.max_model_len, ops)
        self.config = replace(config, max_model_len=self.max_model_len, device=config.device_name)
        self.model_runner = ModelRunner(self.model_config, self.config, num_blocks, ops)
        weights = iter_weights(directory) if make_weights is None else make_weights(self.weight_shapes())
        self.weights_checksum = self.model_runner.load_weights(weights, policy_version=0)
        block_pool = BlockPool(num_blocks, config.block_size, config.enable_prefix_caching)
        self.scheduler = Scheduler(self.config, block_pool, self.weights_checksum)
        self._num_calls = 0

    @property
    def policy_version(self) -> int:
        return self.model_runner.policy_version

    def add_request(
        self, request_id: str, prompt: Prompt, params: SamplingParams | None = None, priority: int = 0
    ) -> None:
        """Queues a prompt (text, token ids or chat messages) with `params.n` samples.

        Without `params.seed` the seed is derived from the engine's and the request id. Smaller priorities go first.

        Raises:
            ValueError: for an empty or too long prompt, ids outside the vocabulary, an id in use, sampling parameters
                that this model cannot serve, or a request that could never fit the KV pool.
        """
        params = params or SamplingParams()
        leader = Request.create_group(
            request_id=request_id,
            prompt_token_ids=encode(self.tokenizer, prompt, self.model_config.vocab_size),
            params=params,
            seed=derive_seed(self.config.seed, request_id) if params.seed is None else params.seed,
            priority=priority,
            eos_token_ids=self.model_config.eos_token_ids,
            tokenizer=self.tokenizer,
            vocab_size=self.model_config.vocab_size,
        )
        self.scheduler.add(leader)

    def step(self) -> StepOutput:
        """Runs one step: what it drew, and the samples that finished with it. Without requests it does nothing."""
        plan = self.scheduler.schedule()
        output = self._execute(plan)
        return self.scheduler.update_from_output(plan, output)

    def has_unfinished(self) -> bool:
        return self.scheduler.has_unfinished()

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
        """Ends requests with what they have (finish_reason "abort"); ValueError names ids that are not unfinished."""
        return self.scheduler.abort(set(request_ids))

    def update_weights(
        self,
        named_tensors: NamedTensors,
        policy_version: int,
        mode: Literal["recompute", "keep"] = "recompute",
        digests: Mapping[str, bytes] | None = None,
    ) -> WeightUpdate:
        """Replaces all weights in place, between two steps.

        `recompute`: running requests keep their tokens, drop their KV and go on under the new weights; exact.
        `keep`: they go on, on KV of the old weights; fast, and their completions say is_exact=False.
        `digests` of tensors that were verified beforehand spare reading them twice (see `Transformer.load_weights`).

        Raises:
            ValueError: for an unknown mode or version, or weights that `Transformer.load_weights` refuses; the engine
                then goes on under the old ones.
        """
        if mode not in ("recompute", "keep"):
            raise ValueError(f"mode={mode!r} must be 'recompute' or 'keep'")
        if not isinstance(policy_version, int) or not 0 <= policy_version <= MAX_POLICY_VERSION:
            raise ValueError(f"policy_version={policy_version!r} must be an integer from 0 to {MAX_POLICY_VERSION}")
        self.weights_checksum = self.model_runner.load_weights(named_tensors, policy_version, digests)
        num_dropped_tokens = self.scheduler.set_weights(self.weights_checksum, mode)
        return WeightUpdate(checksum=self.weights_checksum, num_recomputed_tokens=num_dropped_tokens)

    def weight_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every weight by Hugging Face name: what `update_weights` must be given."""
        return self.model_runner.model.weight_shapes()

    def stats(self) -> EngineStats:
        return self.scheduler.stats(self.policy_version)

    def check_integrity(self) -> None:
        """Asserts that queues, references, free blocks and tables add up."""
        self.scheduler.check_integrity()

    def _execute(self, plan: SchedulerOutput) -> ModelRunnerOutput:
        try:
            return self.model_runner.execute_model(plan)
        except BaseException:  # Ctrl-C too: what the step had written is unknown, so none of it is used again
            self.scheduler.abandon_step()
            raise

    def _add_all(self, ids: list[str], prompts: list[Prompt], all_params: list[SamplingParams]) -> None:
        for i, request_id in enumerate(ids):
            try:
                self.add_request(request_id, prompts[i], all_params[i])
            except ValueError as error:
                if i:
                    self.abort(ids[:i])
                raise ValueError(f"prompt {i}: {error}") from error
