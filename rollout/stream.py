"""RolloutStream: the groups of one submission, in the order in which they finish."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from engine import Completion, SamplingParams
from rollout.errors import translate
from rollout.requests import GroupRequest, GroupResult
from rollout.rollout import Rollout

# How long an engine holds an empty answer back. A dead engine is noticed at once, whatever this is.
POLL_SECONDS = 10.0
_END = object()


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingGroup:
    """A submitted group and what its rollouts need beyond the engine's answer."""

    position: int  # of its prompt in the caller's list
    engine_index: int
    request: GroupRequest
    sampling_params: SamplingParams  # as the caller gave them
    metadata: Mapping[str, Any]
    kernel_fingerprint: str

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
        )


class Submission:
    """Groups that were handed to engines, until each of them is back or given up."""

    def __init__(
        self,
        call_id: str,
        groups: Sequence[PendingGroup],
        engines: Sequence[Any],
        release: Callable[[list[str]], None],
        timeout: float | None,
    ) -> None:
        self._call_id = call_id
        self._engines = engines
        self._release = release
        self._timeout = timeout
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._num_groups = len(groups)
        self._pending = {group.request.group_id: group for group in groups}

    def arrivals(self) -> Iterator[tuple[int, list[Rollout]]]:
        """(place of the prompt, its rollouts) as groups finish."""
        try:
            polls = {self._poll(i): i for i in sorted(self._engines_at_work())}
            while polls:
                ready, _ = ray.wait(list(polls), num_returns=1, timeout=self._remaining_seconds())
                if not ready:
                    raise TimeoutError(self._describe_wait())
                engine_index = polls.pop(ready[0])
                finished = self._take(engine_index, ready[0])
                if engine_index in self._engines_at_work():
                    polls[self._poll(engine_index)] = engine_index
                yield from finished
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Tells engines and coordinator to drop unfinished groups. Waits for nobody: an engine may be dead."""
        if not self._pending or not ray.is_initialized():
            return
        for engine_index in self._engines_at_work():
            self._engines[engine_index].forget.remote(self._call_id)
        self._release(list(self._pending))
        self._pending.clear()

    def _poll(self, engine_index: int) -> ray.ObjectRef:
        return self._engines[engine_index].collect.remote(self._call_id, POLL_SECONDS)

    def _take(self, engine_index: int, answer: ray.ObjectRef) -> list[tuple[int, list[Rollout]]]:
        try:
            results = ray.get(answer)
        except RayError as error:
            raise translate(f"engine {engine_index}", error) from error
        groups = [(self._pending.pop(result.group_id), result) for result in results]
        if groups:
            self._release([result.group_id for result in results])
        return [(group.position, group.rollouts(result)) for group, result in groups]

    def _engines_at_work(self) -> set[int]:
        return {group.engine_index for group in self._pending.values()}

    def _remaining_seconds(self) -> float | None:
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def _describe_wait(self) -> str:
        waits = [f"engine {i}: {self._num_pending(i)} groups" for i in sorted(self._engines_at_work())]
        return (
            f"{len(self._pending)} of {self._num_groups} groups are unfinished after {self._timeout} s "
            f"({', '.join(waits)}) and are aborted: raise timeout, or lower max_tokens"
        )

    def _num_pending(self, engine_index: int) -> int:
        return sum(group.engine_index == engine_index for group in self._pending.values())


class RolloutStream:
    """Iterates over finished groups (lists of Rollout, by sample index), with `for` or `async for`.

    Leaving it early (break, an error, a timeout) aborts the groups that are still running.
    """

    def __init__(self, submission: Submission) -> None:
        # neither refers back to the stream, so that dropping it aborts at once and not at some garbage collection
        self._submission = submission
        self._arrivals = submission.arrivals()

    def __iter__(self) -> Iterator[list[Rollout]]:
        return self

    def __next__(self) -> list[Rollout]:
        return next(self._arrivals)[1]

    def __aiter__(self) -> AsyncIterator[list[Rollout]]:
        return self

    async def __anext__(self) -> list[Rollout]:
        arrival = await asyncio.to_thread(next, self._arrivals, _END)
        if arrival is _END:
            raise StopAsyncIteration
        return arrival[1]

    def in_prompt_order(self) -> list[list[Rollout]]:
        """Waits for all groups."""
        return [group for _, group in sorted(self._arrivals, key=lambda arrival: arrival[0])]

    def close(self) -> None:
        """Aborts what is still running."""
        self._arrivals.close()
        self._submission.give_up()

    def __del__(self) -> None:
        self._submission.give_up()
