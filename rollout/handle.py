"""PoolHandle: generate, submit, abort and sync from any process of the cluster; the pool itself works through one."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from engine import EngineConfig, SamplingParams
from engine.checkpoint import resolve_model
from engine.model import NamedTensors
from engine.prompts import as_prompts
from engine.tokenizer import Prompt, load_tokenizer
from rollout.buffer import Buffered, BufferStats, RolloutBuffer, StalenessLimit
from rollout.coordinator import PoolFacts, PoolStats
from rollout.engine_actor import EngineInfo
from rollout.errors import translate
from rollout.group_maker import GroupMaker
from rollout.journal import Journal
from rollout.metrics import HandleMetrics
from rollout.progress import GroupProgress, stderr_console
from rollout.rollout import Rollout
from rollout.stream import RolloutStream
from rollout.submission import QUEUED_BATCHES, PendingGroup, Submission
from rollout.sync_report import SyncMode, SyncReport
from rollout.weight_sync import WeightSender, check_sync_options
from rollout.weight_transport import Route, WeightDelivery, deliver


class PoolHandle:
    """Picklable: pass it to another Ray actor or task, which may then generate and sync as the pool does."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        seed: int,
        vocab_size: int,
        coordinator: Any,
        staleness_limit: StalenessLimit | None = None,
        pool_name: str = "pool",
    ) -> None:
        self.config = config
        self.seed = seed  # of the run; with a group's id it fixes the group's samples
        self.vocab_size = vocab_size
        self.coordinator = coordinator  # PoolCoordinator handle
        self.staleness_limit = staleness_limit
        self.pool_name = pool_name  # as its actors' names begin, and its metrics are labelled

    def __getstate__(self) -> dict[str, Any]:
        # what is made where it is needed: the tokenizer, and this process's own submissions
        made_here = ("tokenizer", "_buffer", "_maker", "_background", "_journal", "_metrics")
        return {name: value for name, value in self.__dict__.items() if name not in made_here}

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer, as `engine.LLMEngine` has it."""
        return load_tokenizer(resolve_model(self.config.model))

    @property
    def policy_version(self) -> int:
        """The version that the engines draw under, whoever synced it."""
        return self._ask("policy_version")

    @cached_property
    def facts(self) -> PoolFacts:
        """What is known of the pool once its first engines serve; waits for them."""
        return self._ask("facts")

    @property
    def engine_info(self) -> EngineInfo:
        """Of one engine; the others differ in process, node and threads alone."""
        return self.facts.engine_info

    @property
    def kernel_fingerprint(self) -> str:
        """Of all the engines: a pool whose engines differ does not start."""
        return self.engine_info.kernel_fingerprint

    @property
    def engine_infos(self) -> list[EngineInfo]:
        """Of the engines that serve now, by engine id."""
        return self._ask("engine_infos")

    @property
    def engines(self) -> list[Any]:
        """EngineActor handles of the engines that serve now; one that fails is replaced by another actor."""
        return [engine.actor for engine in self._ask("engines")]

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        group_ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        *,
        progress: bool = False,
    ) -> list[list[Rollout]]:
        """Rollouts [prompt][sample], in the order of `prompts`.

        `params` is one for all prompts or a list with one each. `group_ids` name the prompts; with the run's seed they
        fix the samples, whatever engine draws them. Left out, they are g0, g1, ... in the order of submission.
        `metadata` (a mapping for each prompt) is handed through to the rollouts. `timeout` is in seconds.
        `progress` shows a bar on standard error, if that is a terminal.

        An engine that dies or hangs costs time and nothing else. Raises ValueError for the caller's mistakes,
        EngineError if engines fail again and again, TimeoutError; in every case the groups that still run are aborted.
        """
        stream = self.stream(prompts, params, group_ids, metadata, timeout, progress=progress)
        return stream.in_prompt_order()

    def stream(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        group_ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
        timeout: float | None = None,
        *,
        progress: bool = False,
    ) -> RolloutStream:
        """Submits at once, as `generate` does, and iterates over the groups as they finish.

        Engines are given as much as their queues hold, the rest waits here. An iterator of prompts is read no further
        than that; it takes one `params` and neither ids nor metadata, and its groups are named gN/0, gN/1, ...
        """
        if isinstance(prompts, Iterator):
            reserved, groups = self._maker.of_iterator(prompts, params, group_ids, metadata)
            num_groups = None
        else:
            reserved, groups = self._maker.of_list(prompts, params, group_ids, metadata)
            num_groups = len(reserved)
        submission = Submission(self.coordinator, groups, reserved, self.config.max_num_seqs)
        stream = RolloutStream(
            submission, timeout, self._note_delivered, GroupProgress(num_groups, stderr_console() if progress else None)
        )
        try:
            submission.fill()
        except BaseException:
            stream.close()
            raise
        return stream

    def submit(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        group_ids: Sequence[str] | None = None,
        metadata: Sequence[Mapping[str, Any]] | None = None,
    ) -> list[str]:
        """Hands groups to the engines and returns their ids at once; `collect` has the rollouts.

        Raises ValueError for the caller's mistakes, and where `has_capacity` says no.
        """
        num_prompts = len(as_prompts(prompts))
        if not self.has_capacity(num_prompts):
            self._buffer.refuse(num_prompts)
        reserved, groups = self._maker.of_list(prompts, params, group_ids, metadata)
        self._buffer.submit(list(groups))
        return reserved

    def has_capacity(self, num_groups: int = 1) -> bool:
        """Whether so many groups may be submitted: within the pool's `max_staleness`, or what engines can queue."""
        return num_groups <= self.capacity()

    def capacity(self) -> int:
        """How many groups may be submitted now; see `has_capacity`."""
        return self._buffer.capacity()

    def collect(self, num_groups: int, timeout: float | None = None) -> list[list[Rollout]]:
        """The next `num_groups` submitted groups to finish, in the order of their submission.

        Groups with a token of more than `max_staleness` versions ago are left out: dropped, or drawn again
        (`RolloutPool(on_stale=)`), and counted in `buffer_stats`. Those that are not collected stay for the next call.
        Raises ValueError if so many are not on their way, TimeoutError after `timeout` seconds, EngineError.
        """
        if num_groups < 1:
            raise ValueError(f"num_groups={num_groups} must be at least 1")
        return self._buffer.collect(num_groups, timeout)

    def buffer_stats(self) -> BufferStats:
        """Of this handle's `submit` and `collect`: how many groups, and how old they were."""
        return self._buffer.stats()

    def discard(self, num_groups: int) -> None:
        """Says that so many of the groups collected last will not be trained on, such as those whose rewards are alike.

        Groups that are trained on make room for others with the version that comes of them; these make it at once.
        """
        self._buffer.discard(num_groups)

    def buffered(self) -> Buffered:
        """What this handle has submitted and not collected, for a checkpoint; nothing is taken away."""
        return self._buffer.buffered()

    def put_back(self, groups: Sequence[list[Rollout]]) -> None:
        """Finished groups of an earlier run, to be collected before what is submitted after them.

        Raises ValueError for groups of engines with another kernel fingerprint, and where they are more than
        `capacity()`.
        """
        if not self.has_capacity(len(groups)):
            self._buffer.refuse(len(groups))
        for group in groups:
            if group[0].kernel_fingerprint != self.kernel_fingerprint:
                raise ValueError(
                    f"group {group[0].group_id!r} was drawn by kernels with fingerprint {group[0].kernel_fingerprint}, "
                    f"this pool's is {self.kernel_fingerprint}: their bits may differ, so draw it anew"
                )
        self._buffer.put_back([(PendingGroup.from_rollouts(group), group) for group in groups])

    def abort(self, group_ids: Sequence[str]) -> None:
        """Ends running groups: whoever waits for them gets what they have, with finish_reason "abort".

        A group that is on its way to an engine is waited for. Raises ValueError for an id that is not running,
        EngineError for a group that reaches no engine within 60 seconds.
        """
        self._ask("abort", list(group_ids))

    def drain(self, timeout: float = 60.0) -> list[str]:
        """Lets the running groups end and takes no others, on any handle, until the pool is shut down.

        Returns once all are back at their callers. What has not ended after `timeout` seconds is aborted and comes back
        with what it has, finish_reason "abort"; the ids of these groups are returned. From the first moment on `submit`
        and a new `generate` or `stream` raise PoolDrainingError, and so does, in its place, the next prompt of an
        iterator and the next turn of an episode; `collect`, `sync_weights` and `stats` work on.

        Raises ValueError unless `timeout` is at least 0. Call it from another thread than the one that consumes a
        stream: groups that still wait there for room in an engine are placed by that one.
        """
        if not timeout >= 0:
            raise ValueError(f"timeout={timeout!r} must be at least 0 seconds")
        return self._ask("drain", timeout)

    def sync_weights(
        self,
        named_tensors: NamedTensors,
        policy_version: int,
        mode: SyncMode = "recompute",
        *,
        blocking: bool = True,
        rollback: bool = False,
    ) -> SyncReport | Future[SyncReport]:
        """Gives every engine new weights, between two of its steps; running requests go on.

        `named_tensors` is a mapping or a one-shot iterator of (Hugging Face name, tensor), complete; values are synced
        as float32. `mode` says what becomes of running requests: "recompute" keeps their tokens and computes their KV
        anew (exact), "keep" goes on with the KV they have (their rollouts are marked inexact), "wait" lets them end
        under the old weights before an engine switches (exact), "abort" ends them with what they have. Requests that
        have not begun are drawn under the new weights in each mode.

        `blocking=False` returns a future of the report once the tensors have been read, so they may change; the
        switch goes on in the background. `rollback=True` allows an older version.

        Syncs take turns. All engines switch or none does: before the switch an error leaves every engine on its old
        version, and one that fails after it is replaced by one with the new weights. Raises ValueError for a version
        that does not increase and for tensors that are missing, unexpected, misshapen or not finite; EngineError if
        engines break.
        """
        start = time.perf_counter()
        check_sync_options(policy_version, mode)
        shapes = self.engine_info.weight_shapes  # waits for the pool's start, and so for its journal, before it begins
        sync_id = uuid.uuid4().hex
        here = ray.get_runtime_context().get_node_id()
        route = self._ask("begin_sync", sync_id, policy_version, rollback, here)
        sender = WeightSender(shapes)
        with self._ending_sync_on_failure(sync_id):
            self._deliver(route, sync_id, sender, named_tensors)

        def switch() -> SyncReport:
            with self._ending_sync_on_failure(sync_id):
                commits = self._ask("commit", sync_id, mode, sender.checksum, sender.num_bytes)
            report = SyncReport.from_commits(
                policy_version=policy_version,
                seconds=time.perf_counter() - start,
                num_bytes=sender.num_bytes,
                checksum=sender.checksum,
                commits=commits,
            )
            self._metrics.show_sync(report)
            return report

        return switch() if blocking else self._background.submit(switch)

    def stats(self) -> PoolStats:
        """Of the pool and of every engine that serves."""
        return self._ask("stats")

    def write_trace(self) -> list[Path]:
        """Lets every engine write what it recorded (`EngineConfig.trace_path`); the files, each where its engine is."""
        return self._get(*(engine.write_trace.remote() for engine in self.engines))

    def check_integrity(self) -> None:
        """Asserts that every engine's block references, free blocks and tables add up."""
        self._get(*(engine.check_integrity.remote() for engine in self.engines))

    # --- groups ---

    @cached_property
    def _buffer(self) -> RolloutBuffer:
        submission = Submission(self.coordinator, iter(()), (), self.config.max_num_seqs)
        return RolloutBuffer(
            submission,
            self.staleness_limit,
            policy_version=lambda: self.policy_version,
            reserve=lambda group_ids: self._ask("reserve", group_ids),
            num_groups_with_room=lambda: QUEUED_BATCHES * self.config.max_num_seqs * len(self.engines),
            note_delivered=self._note_delivered,
            note_stats=self._note_stats,
        )

    def _note_stats(self, stats: BufferStats) -> None:
        self._metrics.show_buffer(stats)
        if stats.num_collected:
            max_staleness = None if self.staleness_limit is None else self.staleness_limit.max_staleness
            self.coordinator.note_staleness.remote(stats, max_staleness)

    @cached_property
    def _metrics(self) -> HandleMetrics:
        return HandleMetrics(self.pool_name)

    @cached_property
    def _journal(self) -> Journal | None:
        journalling = self.facts.journalling
        return None if journalling is None else journalling.open_journal()

    @property
    def _note_delivered(self) -> Callable[[list[Rollout]], None]:
        """Shown every group just before its caller has it."""
        journal = self._journal
        return _note_nothing if journal is None else journal.write_group

    @cached_property
    def _maker(self) -> GroupMaker:
        return GroupMaker(
            tokenizer=self.tokenizer,
            seed=self.seed,
            vocab_size=self.vocab_size,
            max_model_len=self.engine_info.max_model_len,
            max_num_seqs=self.config.max_num_seqs,
            kernel_fingerprint=self.kernel_fingerprint,
            reserve=lambda group_ids: self._ask("reserve", group_ids),
        )

    # --- weights ---

    @cached_property
    def _background(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(1, thread_name_prefix="lockstep-sync")

    @contextmanager
    def _ending_sync_on_failure(self, sync_id: str) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.coordinator.end_sync.remote(sync_id)
            self._metrics.show_failed_sync()
            raise

    def _deliver(self, route: Route, sync_id: str, sender: WeightSender, named_tensors: NamedTensors) -> None:
        """First phase: every engine holds all weights and has verified them."""
        nodes = route.engine_nodes
        with WeightDelivery(route, sync_id, self.engine_info.weight_shapes) as delivery:
            deliver(
                delivery,
                sender.buckets(named_tensors, delivery.room),
                nodes,
                lambda number, i, parcel: self.coordinator.stage.remote(sync_id, number, nodes[i], parcel),
            )

    # --- asking ---

    def _ask(self, method: str, *args: Any) -> Any:
        return self._get(getattr(self.coordinator, method).remote(*args))[0]

    def _get(self, *answers: ray.ObjectRef) -> list[Any]:
        try:
            return ray.get(list(answers))
        except RayError as error:
            raise translate("the pool's coordinator", error) from error


def _note_nothing(group: list[Rollout]) -> None:
    pass
