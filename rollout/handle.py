"""PoolHandle: generate, abort and sync from any process of the cluster; the pool itself works through one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from engine import EngineConfig, SamplingParams
from engine.checkpoint import resolve_model
from engine.model import NamedTensors
from engine.outputs import EngineStats
from engine.prompts import as_prompts, per_prompt_params
from engine.tokenizer import Prompt, load_tokenizer
from rollout import requests
from rollout.engine_actor import EngineInfo
from rollout.errors import translate
from rollout.requests import GroupRequest
from rollout.rollout import Rollout
from rollout.router import Assignment
from rollout.stream import PendingGroup, RolloutStream, Submission
from rollout.sync_report import CommitReport, SyncMode, SyncReport
from rollout.weight_sync import WeightBucket, WeightSender, check_sync_options


class PoolHandle:
    """Picklable: pass it to another Ray actor or task, which may then generate and sync as the pool does."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        seed: int,
        vocab_size: int,
        engines: Sequence[Any],
        engine_infos: Sequence[EngineInfo],
        coordinator: Any,
    ) -> None:
        self.config = config
        self.seed = seed  # of the run; with a group's id it fixes the group's samples
        self.vocab_size = vocab_size
        self.engines = tuple(engines)  # EngineActor handles
        self.engine_infos = tuple(engine_infos)
        self.coordinator = coordinator  # PoolCoordinator handle

    def __getstate__(self) -> dict[str, Any]:
        # the tokenizer is loaded again where it is needed
        return {name: value for name, value in self.__dict__.items() if name != "tokenizer"}

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as `engine.LLMEngine` has it."""
        return load_tokenizer(resolve_model(self.config.model))

    @property
    def policy_version(self) -> int:
        """The version that the engines draw under, whoever synced it."""
        return self._ask_coordinator("policy_version")

    @property
    def kernel_fingerprint(self) -> str:
        """Of all the engines: a pool whose engines differ does not start."""
        return self.engine_infos[0].kernel_fingerprint

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        group_ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> list[list[Rollout]]:
        """Rollouts [prompt][sample], in the order of `prompts`.

        `params` is one for all prompts or a list with one each. `group_ids` name the prompts; with the run's seed they
        fix the samples, whatever engine draws them. Left out, they are g0, g1, ... in the order of submission.
        `metadata` (a mapping for each prompt) is handed through to the rollouts. `timeout` is in seconds.

        Raises ValueError for the caller's mistakes, EngineError if an engine breaks, TimeoutError; in every case the
        groups that still run are aborted.
        """
        return self.stream(prompts, params, group_ids, metadata, timeout).in_prompt_order()

    def stream(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        group_ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
    ) -> RolloutStream:
        """Submits at once, as `generate` does, and iterates over the groups as they finish."""
        call_id = uuid.uuid4().hex
        groups = self._place(*self._check(prompts, params, group_ids, metadata))
        stream = RolloutStream(Submission(call_id, groups, self.engines, self._release, timeout))
        try:
            self._submit(call_id, groups)
        except BaseException:
            stream.close()
            raise
        return stream

    def abort(self, group_ids: Sequence[str]) -> None:
        """Ends running groups: whoever waits for them gets what they have, with finish_reason "abort".

        Raises ValueError for an id that is not running.
        """
        by_engine = self._ask_coordinator("locate", list(group_ids))
        self._ask_engines({i: self.engines[i].abort.remote(ids) for i, ids in by_engine.items()})

    def sync_weights(
        self, named_tensors: NamedTensors, policy_version: int, mode: SyncMode = "recompute"
    ) -> SyncReport:
        """Gives every engine new weights, between two of its steps; running requests go on.

        `named_tensors` is a mapping or a one-shot iterator of (Hugging Face name, tensor), complete; values are synced
        as float32. `mode` says what becomes of running requests: "recompute" keeps their tokens and computes their KV
        anew (exact), "keep" goes on with the KV they have (their rollouts are marked inexact), "wait" lets them end
        under the old weights before an engine switches (exact), "abort" ends them with what they have. Requests that
        have not begun are drawn under the new weights in each mode.

        All engines switch or none does. Raises ValueError, with every engine on its old version, for a version that
        does not increase and for tensors that are missing, unexpected, misshapen or not finite; EngineError if an
        engine breaks.
        """
        start = time.perf_counter()
        check_sync_options(policy_version, mode)
        self._ask_coordinator("check_policy_version", policy_version)
        sync_id = uuid.uuid4().hex
        sender = WeightSender(self.engine_infos[0].weight_shapes)
        try:
            self._stage(sync_id, sender.buckets(named_tensors))
            commits = self._commit(sync_id, policy_version, mode)
        except BaseException:
            for engine in self.engines:
                engine.discard_weights.remote(sync_id)
            raise
        return SyncReport.from_commits(
            policy_version=policy_version,
            seconds=time.perf_counter() - start,
            num_bytes=sender.num_bytes,
            checksum=sender.checksum,
            commits=commits,
        )

    def stats(self) -> list[EngineStats]:
        """Of every engine, in engine order."""
        return self._ask_engines({i: engine.stats.remote() for i, engine in enumerate(self.engines)})

    def write_trace(self) -> list[Path]:
        """Lets every engine write what it recorded (`EngineConfig.trace_path`); the files, each where its engine is."""
        return self._ask_engines({i: engine.write_trace.remote() for i, engine in enumerate(self.engines)})

    def check_integrity(self) -> None:
        """Asserts that every engine's block references, free blocks and tables add up."""
        self._ask_engines({i: engine.check_integrity.remote() for i, engine in enumerate(self.engines)})

    # --- generating ---

    def _check(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None,
        group_ids: Sequence[str] | None,
        metadata: Sequence[Mapping[str, Any]] | None,
    ) -> tuple[list[list[int]], list[SamplingParams], list[str | None], list[Mapping[str, Any]]]:
        """Everything that can be wrong with a call is found here, before anything is sent."""
        max_model_len = self.engine_infos[0].max_model_len
        prompt_token_ids = requests.encode_prompts(self.tokenizer, as_prompts(prompts), self.vocab_size, max_model_len)
        return (
            prompt_token_ids,
            per_prompt_params(params, len(prompt_token_ids)),
            requests.per_prompt_group_ids(group_ids, len(prompt_token_ids)),
            requests.per_prompt_metadata(metadata, len(prompt_token_ids)),
        )

    def _place(
        self,
        prompt_token_ids: list[list[int]],
        params: list[SamplingParams],
        group_ids: list[str | None],
        metadata: list[Mapping[str, Any]],
    ) -> list[PendingGroup]:
        costs = [requests.token_cost(p, q) for p, q in zip(prompt_token_ids, params, strict=True)]
        assignments = self._ask_coordinator("assign", list(zip(group_ids, costs, strict=True)))
        return [
            self._pending_group(i, assignments[i], prompt_token_ids[i], params[i], metadata[i])
            for i in range(len(assignments))
        ]

    def _pending_group(
        self,
        position: int,
        assignment: Assignment,
        prompt_token_ids: list[int],
        params: SamplingParams,
        metadata: Mapping[str, Any],
    ) -> PendingGroup:
        request = GroupRequest(
            group_id=assignment.group_id,
            prompt_token_ids=prompt_token_ids,
            params=requests.seeded(params, self.seed, assignment.group_id),
        )
        return PendingGroup(
            position=position,
            engine_index=assignment.engine_index,
            request=request,
            sampling_params=params,
            metadata=metadata,
            kernel_fingerprint=self.kernel_fingerprint,
        )

    def _submit(self, call_id: str, groups: list[PendingGroup]) -> None:
        by_engine: dict[int, list[GroupRequest]] = {}
        for group in groups:
            by_engine.setdefault(group.engine_index, []).append(group.request)
        self._ask_engines({i: self.engines[i].submit.remote(call_id, batch) for i, batch in by_engine.items()})

    def _release(self, group_ids: list[str]) -> None:
        self.coordinator.release.remote(group_ids)

    # --- syncing ---

    def _stage(self, sync_id: str, buckets: Iterator[WeightBucket]) -> None:
        """First phase: every engine holds all tensors and has verified them."""
        acknowledgements: list[tuple[int, ray.ObjectRef]] = []
        for bucket in buckets:
            # one copy in shared memory for all engines, which verify it while the next bucket is read
            shared = ray.put(bucket)
            acknowledgements += [(i, e.stage_weights.remote(sync_id, shared)) for i, e in enumerate(self.engines)]
        for i, acknowledgement in acknowledgements:
            self._ask_engines({i: acknowledgement})

    def _commit(self, sync_id: str, policy_version: int, mode: SyncMode) -> list[CommitReport]:
        """Second phase: every engine switches."""
        reports = self._ask_coordinator("commit", sync_id, policy_version, mode)
        for report in reports:
            if isinstance(report, Exception):
                raise type(report)(f"weight sync to policy_version={policy_version}: {report}") from report
        return reports

    # --- asking ---

    def _ask_coordinator(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self.coordinator, method).remote(*args))
        except RayError as error:
            raise translate("the pool's coordinator", error) from error

    def _ask_engines(self, answers: Mapping[int, ray.ObjectRef]) -> list[Any]:
        results = []
        for engine_index, answer in answers.items():
            try:
                results.append(ray.get(answer))
            except RayError as error:
                raise translate(f"engine {engine_index}", error) from error
        return results
