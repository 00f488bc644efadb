"""Submission: groups of one caller on their way - handed to engines, taken back, placed anew when an engine is lost."""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray.exceptions import RayError

from engine import Completion, SamplingParams
from rollout.coordinator import Placement
from rollout.errors import Loss, is_loss, loss_of, translate
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
    """Each group comes back exactly once, whatever becomes of the engines that draw it."""

    def __init__(
        self, coordinator: Any, groups: Iterator[PendingGroup], reserved_ids: Iterable[str], samples_at_once: int
    ) -> None:
        """groups: those to submit, read as far as engines have room for them; more may be given with `add`.
        reserved_ids: in use until their groups are back or given up. samples_at_once: that one engine runs."""
        self._coordinator = coordinator
        self._reserved = set(reserved_ids)
        self._waiting = groups
        self._next: PendingGroup | None = None  # read from `groups`, but there was no room yet
        self._samples_at_once = samples_at_once
        self._num_engines = 1
        self._num_samples = 0  # placed and not back
        self._call_id = uuid.uuid4().hex
        self._placed: dict[str, _Placed] = {}
        self._at_work: dict[EngineRef, int] = {}  # groups at every engine that has some
        self._polls: dict[ray.ObjectRef, EngineRef] = {}

    def __len__(self) -> int:
        """Groups that are placed and not back."""
        return len(self._placed)

    def add(self, groups: list[PendingGroup]) -> None:
        """Places further groups at once."""
        placement = self._ask("assign", [group.routed for group in groups])
        self._send({group.request.group_id: group for group in groups}, placement)

    def fill(self) -> None:
        """Places as many of the waiting groups as engines have room for, and at least one."""
        while batch := self._read_batch():
            self.add(batch)

    def take(self, timeout: float | None) -> list[tuple[PendingGroup, GroupResult]]:
        """Finished groups, at least one; none where `timeout` seconds have passed or nothing is placed.

        Raises ValueError for what an engine refuses, EngineError where groups cannot be drawn any more.
        """
        self.fill()
        self._poll()
        ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=timeout) if self._polls else ([], [])
        return [arrived for answer in ready for arrived in self._receive(self._polls.pop(answer), answer)]

    def give_up(self) -> None:
        """Tells engines and coordinator to drop all groups. Waits for nobody: an engine may be dead."""
        self._waiting, self._next = iter(()), None
        unreturned, self._reserved = self._reserved | self._placed.keys(), set()
        if not unreturned or not ray.is_initialized():
            return
        for engine in self._at_work:
            engine.actor.forget.remote(self._call_id)
        self._coordinator.release.remote(list(unreturned))
        self._placed.clear()
        self._at_work.clear()

    def num_groups_by_engine(self) -> dict[int, int]:
        return dict(sorted((engine.engine_id, count) for engine, count in self._at_work.items()))

    def _read_batch(self) -> list[PendingGroup]:
        batch: list[PendingGroup] = []
        room = QUEUED_BATCHES * self._samples_at_once * self._num_engines - self._num_samples
        while room > 0 or not (batch or self._placed):
            group = self._next or next(self._waiting, None)
            self._next = None
            if group is None:
                break
            batch.append(group)
            room -= group.request.params.n
        return batch

    def _send(self, groups: Mapping[str, PendingGroup], placement: Placement) -> None:
        """Hands placed groups to their engines. Who is gone by now is found out by the polls."""
        self._num_engines = placement.num_engines
        requests: dict[int, list[GroupRequest]] = {}
        for assignment in placement.assignments:
            group, engine = groups[assignment.group_id], placement.engines[assignment.engine_id]
            self._note_placed(group, engine)
            partial = tuple(placement.partials.get(assignment.group_id, ()))
            requests.setdefault(assignment.engine_id, []).append(replace(group.request, resume=partial))
        for engine_id, batch in requests.items():
            placement.engines[engine_id].actor.submit.remote(self._call_id, batch)

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

    def _poll(self) -> None:
        """One question is open at every engine that has work of this submission."""
        for engine in self._at_work.keys() - set(self._polls.values()):
            self._polls[engine.actor.collect.remote(self._call_id, POLL_SECONDS)] = engine

    def _receive(self, engine: EngineRef, answer: ray.ObjectRef) -> list[tuple[PendingGroup, GroupResult]]:
        try:
            results = ray.get(answer)
        except RayError as error:
            failure = translate(str(engine), error)
            if not is_loss(error):
                raise failure from error
            self._recover(engine, loss_of(error), failure)
            return []
        arrived = [(self._note_gone(r.group_id), r) for r in results if r.group_id in self._placed]
        if arrived:
            group_ids = [result.group_id for _, result in arrived]
            self._reserved.difference_update(group_ids)
            self._coordinator.release.remote(group_ids)
        return arrived

    def _recover(self, engine: EngineRef, loss: Loss, failure: Exception) -> None:
        """The engine is gone: its groups go on elsewhere, from what it had handed over."""
        group_ids = [group_id for group_id, placed in self._placed.items() if placed.engine == engine]
        if group_ids:
            placement = self._ask("recover", engine, loss, str(failure), group_ids)
            self._send({group_id: self._note_gone(group_id) for group_id in group_ids}, placement)

    def _ask(self, method: str, *args: Any) -> Any:
        try:
            return ray.get(getattr(self._coordinator, method).remote(*args))
        except RayError as error:
            raise translate("the pool's coordinator", error) from error
