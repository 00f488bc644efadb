"""Submission: groups of one caller on their way - handed to engines, taken back, placed anew when an engine is lost."""

from __future__ import annotations

import queue
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from engine import Completion, SamplingParams
from rollout.coordinator import Placement
from rollout.errors import Loss, PoolDrainingError, is_loss, loss_of, translate
from rollout.fleet import EngineRef
from rollout.requests import GroupRequest, GroupResult, token_cost
from rollout.rollout import Rollout
from rollout.router import Routed, prefixes_of

# How long an engine holds an empty answer back. A dead engine is noticed at once, whatever this is.
POLL_SECONDS = 10.0
QUEUED_BATCHES = 4  # samples handed to an engine, in units of what it runs at once; the others wait at the caller


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingGroup:
    """A group and what its rollouts need beyond the engine's answer."""

    position: int  # of its prompt among the caller's
    request: GroupRequest
    sampling_params: SamplingParams  # as the caller gave them
    metadata: Mapping[str, Any]
    kernel_fingerprint: str

    @classmethod
    def from_rollouts(cls, rollouts: Sequence[Rollout]) -> PendingGroup:
        """The group that they are the samples of."""
        first = rollouts[0]
        request = GroupRequest(
            group_id=first.group_id,
            prompt_token_ids=list(first.prompt_token_ids),
            params=replace(first.sampling_params, seed=first.seed),
        )
        return cls(
            position=0,
            request=request,
            sampling_params=first.sampling_params,
            metadata=first.metadata,
            kernel_fingerprint=first.kernel_fingerprint,
        )

    @property
    def routed(self) -> Routed:
        request = self.request
        return Routed(
            group_id=request.group_id,
            num_tokens=token_cost(request.prompt_token_ids, request.params),
            prefixes=prefixes_of(request.prompt_token_ids),
        )

    def rollouts(self, result: GroupResult) -> list[Rollout]:
        return [self._rollout(completion) for completion in result.completions]

    def _rollout(self, completion: Completion) -> Rollout:
        return Rollout(
            group_id=self.request.group_id,
            index=completion.index,
            prompt_token_ids=list(self.request.prompt_token_ids),
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            policy_versions=completion.policy_versions,
            finish_reason=completion.finish_reason,
            stop_reason=completion.stop_reason,
            text=completion.text,
            loss_mask=[1] * len(completion.token_ids),
            seed=self.request.params.seed,
            sampling_params=self.sampling_params,
            is_exact=completion.is_exact,
            kernel_fingerprint=self.kernel_fingerprint,
            metadata=self.metadata,
            raw_logprobs=completion.raw_logprobs,
            kept_mass=completion.kept_mass,
            top_logprobs=completion.top_logprobs,
            prompt_logprobs=completion.prompt_logprobs,
            timing=completion.timing,
        )


@dataclass(slots=True)
class _Placed:
    group: PendingGroup
    engine: EngineRef


class Submission:
    """Each group comes back exactly once, whatever becomes of the engines that draw it.

    A thread of its own takes answers in and places groups anew, so nothing waits for a caller who is busy elsewhere.
    """

    def __init__(
        self, coordinator: Any, groups: Iterator[PendingGroup], reserved_ids: Iterable[str], samples_at_once: int
    ) -> None:
        """groups: those to submit, read as far as engines have room for them; more may be given with `add`.
        reserved_ids: in use until their groups are back or given up. samples_at_once: that one engine runs."""
        self._coordinator = coordinator
        self._waiting = groups  # read by the caller's thread alone, as is the next one
        self._next: PendingGroup | None = None  # read from `groups`, but there was no room yet
        self._samples_at_once = samples_at_once
        self._call_id = uuid.uuid4().hex
        self._answers: queue.SimpleQueue[tuple[EngineRef, Future] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()  # guards what follows
        self._reserved = set(reserved_ids)
        self._num_engines = 1
        self._num_samples = 0  # placed and not back
        self._placed: dict[str, _Placed] = {}
        self._at_work: dict[EngineRef, int] = {}  # groups at every engine that has some
        self._polled: set[EngineRef] = set()  # engines where a question is open
        self._arrived: list[tuple[PendingGroup, GroupResult]] = []  # and not taken
        self._failure: Exception | None = None
        self._refusal: PoolDrainingError | None = None  # of groups that were waiting; used by the caller's thread alone
        self._is_given_up = False

    def __len__(self) -> int:
        """Groups that are placed and not taken."""
        with self._changed:
            return len(self._placed) + len(self._arrived)

    def add(self, groups: list[PendingGroup]) -> None:
        """Places further groups at once."""
        placement = self._ask("assign", [group.routed for group in groups])
        self._send({group.request.group_id: group for group in groups}, placement)

    def fill(self) -> None:
        """Places as many of the waiting groups as engines have room for, at least one where nothing is placed.

        A pool that drains may refuse them; `check_complete` says so once the others are back.
        """
        while batch := self._read_batch():
            try:
                self.add(batch)
            except PoolDrainingError as refusal:
                self._waiting, self._refusal = iter(()), refusal
                return

    def take(self, timeout: float | None) -> list[tuple[PendingGroup, GroupResult]]:
        """Finished groups, at least one; none where `timeout` seconds have passed or nothing is placed.

        Raises ValueError for what an engine refuses, EngineError where groups cannot be drawn any more.
        """
        self.fill()
        with self._changed:
            self._changed.wait_for(lambda: self._arrived or self._failure or not self._placed, timeout)
            if self._failure is not None:
                raise self._failure
            arrived, self._arrived = self._arrived, []
            return arrived

    def check_complete(self) -> None:
        """Raises PoolDrainingError if groups were refused."""
        if self._refusal is not None:
            raise self._refusal

    def give_up(self) -> None:
        """Tells engines and coordinator to drop all groups. Waits for nobody: an engine may be dead."""
        self._waiting, self._next = iter(()), None
        with self._changed:
            self._is_given_up = True
            unreturned, self._reserved = self._reserved | self._placed.keys(), set()
            engines = list(self._at_work)
            self._placed.clear()
            self._at_work.clear()
        self._answers.put(None)
        if unreturned and ray.is_initialized():
            for engine in engines:
                engine.actor.forget.remote(self._call_id)
            self._coordinator.release.remote(list(unreturned))

    def num_groups_by_engine(self) -> dict[int, int]:
        with self._changed:
            return dict(sorted((engine.engine_id, count) for engine, count in self._at_work.items()))

    def _read_batch(self) -> list[PendingGroup]:
        batch: list[PendingGroup] = []
        with self._changed:
            room = QUEUED_BATCHES * self._samples_at_once * self._num_engines - self._num_samples
            is_idle = not (self._placed or self._arrived)
        if room < self._samples_at_once and not is_idle:
            return []  # engines have plenty queued: a message for every group that ends would cost more than the group
        while room > 0 or (is_idle and not batch):
            group = self._next or next(self._waiting, None)
            self._next = None
            if group is None:
                break
            batch.append(group)
            room -= group.request.params.n
        return batch

    def _send(self, groups: Mapping[str, PendingGroup], placement: Placement) -> None:
        """Hands placed groups to their engines. Who is gone by now is found out by the polls."""
        requests: dict[EngineRef, list[GroupRequest]] = {}
        with self._changed:
            if self._is_given_up:
                self._coordinator.release.remote(list(groups))
                return
            self._num_engines = placement.num_engines
            for assignment in placement.assignments:
                group, engine = groups[assignment.group_id], placement.engines[assignment.engine_id]
                self._note_placed(group, engine)
                partial = tuple(placement.partials.get(assignment.group_id, ()))
                requests.setdefault(engine, []).append(replace(group.request, resume=partial))
            for engine, batch in requests.items():
                engine.actor.submit.remote(self._call_id, batch)
                self._poll(engine)
            if self._thread is None:
                self._thread = threading.Thread(target=self._take_in_answers, name="lockstep-groups", daemon=True)
                self._thread.start()

    def _note_placed(self, group: PendingGroup, engine: EngineRef) -> None:
        self._placed[group.request.group_id] = _Placed(group, engine)
        self._at_work[engine] = self._at_work.get(engine, 0) + 1
        self._num_samples += group.request.params.n

    def _note_gone(self, group_id: str) -> PendingGroup:
        """The group has left its engine."""
        placed = self._placed.pop(group_id)
        self._at_work[placed.engine] -= 1
        if not self._at_work[placed.engine]:
            del self._at_work[placed.engine]
        self._num_samples -= placed.group.request.params.n
        return placed.group

    def _poll(self, engine: EngineRef) -> None:
        """One question is open at every engine that has work of this submission."""
        if engine in self._polled or engine not in self._at_work:
            return
        self._polled.add(engine)
        answer = engine.actor.collect.remote(self._call_id, POLL_SECONDS).future()
        answers = self._answers
        answer.add_done_callback(lambda done: answers.put((engine, done)))

    # --- the thread's ---

    def _take_in_answers(self) -> None:
        while (answer := self._answers.get()) is not None:
            engine, done = answer
            try:
                self._receive(engine, done)
            except Exception as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return

    def _receive(self, engine: EngineRef, done: Future) -> None:
        with self._changed:
            self._polled.discard(engine)
        error = done.exception()
        if error is None:
            self._note_arrived(engine, done.result())
        elif is_loss(error):
            self._recover(engine, loss_of(error), translate(str(engine), error))
        else:
            raise translate(str(engine), error) from error

    def _note_arrived(self, engine: EngineRef, results: list[GroupResult]) -> None:
        with self._changed:
            arrived = [(self._note_gone(r.group_id), r) for r in results if r.group_id in self._placed]
            group_ids = [result.group_id for _, result in arrived]
            self._reserved.difference_update(group_ids)
            self._arrived += arrived
            if group_ids:  # before the caller sees them, who may use the ids again
                self._coordinator.release.remote(group_ids)
            self._poll(engine)
            self._changed.notify_all()

    def _recover(self, engine: EngineRef, loss: Loss, failure: Exception) -> None:
        """The engine is gone: its groups go on elsewhere, from what it had handed over."""
        with self._changed:
            group_ids = [group_id for group_id, placed in self._placed.items() if placed.engine == engine]
        if not group_ids:
            return
        placement = self._ask("recover", engine, loss, str(failure), group_ids)
        with self._changed:
            groups = {group_id: self._note_gone(group_id) for group_id in group_ids if group_id in self._placed}
        self._send(groups, placement)

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._coordinator, method).remote(*args))
        except RayError as error:
            raise translate("the pool's coordinator", error) from error
