"""Trainer group: several trainer ranks behind the interface of the one GRPOActor or PPOActor.

The group is a Ray actor that owns the ranks' actors, so they end with it. It hands every call to all ranks, whose
exchanges then meet, and answers with rank 0's result. Each rank gets the whole batch and takes its own share
(shares.py): what is wrong with a batch is thus found by all of them, before any waits for another.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError

from engine.config import available_cores
from rollout import PoolHandle, Rollout, SyncReport, logs
from rollout.cluster import actor_env, helper_env
from rollout.sync_report import SyncMode
from trainers.objective_config import ObjectiveConfig
from trainers.trainer_rank import TrainerRank

GRACE_SECONDS = 10.0  # for the other ranks to answer, once one has failed
STOP_SECONDS = 30.0


class TrainerRankError(RuntimeError):
    """A trainer rank died, failed alone or did not answer; all of them were stopped."""


class TrainerGroup:
    """Starts the ranks and speaks for them; `start_trainer_group` puts it into a Ray actor.

    What all ranks raise alike is raised as it was, and so is what rank 0 alone raised after the others were done (an
    engine that refuses weights); the group goes on. Any other failure leaves a rank without its partners: it ends the
    group with a TrainerRankError, at the latest trainer_timeout and a grace of 10 seconds after the failure.
    """

    def __init__(self, config: ObjectiveConfig, pool: PoolHandle) -> None:
        logs.configure(pool=pool.pool_name, actor="trainer-group")
        self.failure: str | None = None
        self.ranks = [_start_rank(rank, config) for rank in range(config.num_trainer_ranks)]
        meeting_place = ray.get(self.ranks[0].meeting_place.remote())
        engine = pool.config
        self._on_all("start", meeting_place, engine.model, engine.numerics, config, pool, engine.device)

    def step(self, rollouts: Sequence[Rollout], judged: Sequence[float], *others: Any) -> Any:
        """GRPOActor.step or PPOActor.step on the ranks' shares of the rollouts; answers are of the whole batch."""
        return self._call("step", rollouts, judged, *others)

    def sync(self, mode: SyncMode = "recompute") -> SyncReport:
        """Rank 0 hands the weights to every engine; sharded ones are gathered one at a time on the way."""
        return self._call("sync", mode)

    def expected_reward(self, prompts: Sequence[Any], answers: Sequence[str | Sequence[str]]) -> float:
        """Policy.expected_reward, the same bits as with one rank."""
        return self._call("expected_reward", prompts, answers)

    def save_pretrained(self, directory: str) -> None:
        self._call("save_pretrained", directory)

    def checkpoint_num_bytes(self) -> int:
        return self._call("checkpoint_num_bytes")

    def save_checkpoint(self, directory: str) -> dict[str, int]:
        """TrainerActor.save_checkpoint; rank 0 writes what any number of ranks can load."""
        return self._call("save_checkpoint", directory)

    def load_checkpoint(self, directory: str, facts: Mapping[str, int]) -> None:
        """TrainerActor.load_checkpoint on every rank: the directory must be seen by all of them."""
        self._call("load_checkpoint", directory, facts)

    def environment(self) -> dict[str, Any]:
        """TrainerActor.environment of rank 0, and `ranks`: that of each."""
        environments = self._on_all("call", "environment")
        return {**environments[0], "ranks": environments}

    def process_ids(self) -> list[int]:
        """Of the ranks, each on its node."""
        return self._on_all("process_id")

    def _call(self, method: str, *arguments: Any) -> Any:
        return self._on_all("call", method, *arguments)[0]

    def _on_all(self, method: str, *arguments: Any) -> list[Any]:
        """The answers of all ranks."""
        if self.failure is not None:
            raise TrainerRankError(self.failure)
        shared = [ray.put(argument) for argument in arguments]
        answers = _collect([getattr(rank, method).remote(*shared) for rank in self.ranks])
        failed = [answer for answer in answers.values() if isinstance(answer, RayError)]
        if not failed and len(answers) == len(self.ranks):
            return [answers[rank] for rank in range(len(self.ranks))]
        if _is_common(answers, len(self.ranks)):
            raise failed[0].cause
        self._stop()
        what = arguments[0] if method == "call" else method
        self.failure = _describe(answers, len(self.ranks), what)
        raise TrainerRankError(self.failure)

    def _stop(self) -> None:
        for rank in self.ranks:
            ray.kill(rank)
        ends = [rank.__ray_ready__.remote() for rank in self.ranks]
        ray.wait(ends, num_returns=len(ends), timeout=STOP_SECONDS)


def start_trainer_group(config: ObjectiveConfig, pool: PoolHandle) -> Any:
    """A Ray actor around config.num_trainer_ranks ranks on the pool's model, with the methods of the one actor whose
    config it is."""
    num_threads = config.num_threads or max(1, available_cores() // config.num_trainer_ranks)
    actor_class = ray.remote(num_cpus=0, runtime_env=helper_env())(TrainerGroup)
    return actor_class.remote(replace(config, num_threads=num_threads), pool)


def _start_rank(rank: int, config: ObjectiveConfig) -> Any:
    actor_class = ray.remote(num_cpus=0, runtime_env=actor_env(config.num_threads))(TrainerRank)
    return actor_class.remote(rank, config.num_trainer_ranks)


def _collect(calls: Sequence[ray.ObjectRef]) -> dict[int, Any]:
    """The ranks' answers by rank, errors among them. After the first error those that take longer are left out."""
    waiting, answers = {call: rank for rank, call in enumerate(calls)}, {}
    deadline: float | None = None
    while waiting:
        timeout = None if deadline is None else max(0.0, deadline - time.monotonic())
        done, _ = ray.wait(list(waiting), timeout=timeout)
        if not done:
            break
        rank = waiting.pop(done[0])
        answers[rank] = _answer(done[0])
        if isinstance(answers[rank], RayError):
            deadline = deadline or time.monotonic() + GRACE_SECONDS
    return answers


def _answer(call: ray.ObjectRef) -> Any:
    try:
        return ray.get(call)
    except RayError as error:
        return error


def _is_common(answers: Mapping[int, Any], num_ranks: int) -> bool:
    """Whether the ranks, all of which answered, are still in step."""
    errors = {rank: answer for rank, answer in answers.items() if isinstance(answer, RayError)}
    if len(answers) < num_ranks or not all(isinstance(error, RayTaskError) for error in errors.values()):
        return False
    kinds = {(type(error.cause), str(error.cause)) for error in errors.values()}
    return list(errors) == [0] or (len(errors) == num_ranks and len(kinds) == 1)


def _describe(answers: Mapping[int, Any], num_ranks: int, method: str) -> str:
    """What became of each rank that has no result: those that died first, then those that others waited for."""
    failed = {rank: answer for rank, answer in sorted(answers.items()) if isinstance(answer, RayError)}
    died = [f"rank {rank} died" for rank, error in failed.items() if not isinstance(error, RayTaskError)]
    silent = [f"rank {rank} did not answer" for rank in range(num_ranks) if rank not in answers]
    raised = [
        f"rank {rank} raised {type(error.cause).__name__}: {error.cause}"
        for rank, error in failed.items()
        if isinstance(error, RayTaskError)
    ]
    return (
        f"trainer {'; '.join([*died, *silent, *raised])} (of {num_ranks} ranks, in {method}). All ranks were stopped: "
        "go on from the run's latest checkpoint, or start it again"
    )
