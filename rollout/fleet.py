"""Fleet: the engine actors of a pool - started, watched, replaced when they die or hang, and caught up."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import ray
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from engine import EngineConfig
from rollout.engine_actor import EngineActor, EngineFactory, EngineInfo, EngineName
from rollout.errors import EngineError, EngineUnplacedError, translate

logger = logging.getLogger(__name__)

MAX_FAILED_STARTS = 3  # in a row, of a replacement; then callers are told, and it is tried again now and then
RETRY_SECONDS, MAX_RETRY_SECONDS = 10.0, 300.0  # between later tries; each waits twice as long as the one before
WATCH_SECONDS = 5.0
STOP_SECONDS = 10.0

SlotState = Literal["starting", "serving", "retired", "failed"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineSpec:
    """How an engine actor is made."""

    config: EngineConfig
    engine_factory: EngineFactory | None  # None: LLMEngine
    runtime_env: dict[str, Any]
    num_cpus: float = 0.0
    num_gpus: float = 0.0
    pool_name: str = "pool"
    placement_group: Any = None  # a bundle for each engine; None spreads them over the nodes
    num_bundles: int = 0  # of the placement group; engines beyond it are spread
    start_seconds: float = 900.0  # in which it must be ready once it has a place
    hang_seconds: float = 300.0  # for which a step, a command or an answer may take

    def create(self, engine_id: int, incarnation: int) -> Any:
        """A named actor, in the namespace of the pool's Ray job."""
        strategy: Any = "SPREAD"
        if engine_id < self.num_bundles:
            strategy = PlacementGroupSchedulingStrategy(self.placement_group, placement_group_bundle_index=engine_id)
        name = EngineName(pool=self.pool_name, engine_id=engine_id, incarnation=incarnation)
        return EngineActor.options(
            name=str(name),
            num_cpus=self.num_cpus,
            num_gpus=self.num_gpus,
            scheduling_strategy=strategy,
            runtime_env=self.runtime_env,
        ).remote(name)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRef:
    """One life of an engine, as callers know it."""

    engine_id: int
    incarnation: int  # counts the actors that have had this place
    actor: Any = field(compare=False, repr=False)

    def __str__(self) -> str:
        return f"engine {self.engine_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """What went wrong with an engine."""

    time: float  # seconds since the epoch
    engine_id: int
    incarnation: int
    phase: Literal["start", "serve", "hang"]
    cause: str


@dataclass(slots=True, eq=False)
class Slot:
    """A place in the fleet, whose actor may change."""

    engine_id: int
    state: SlotState = "starting"
    incarnation: int = -1
    actor: Any = None
    info: EngineInfo | None = None
    failure: EngineError | ValueError | None = None
    num_failed_starts: int = 0
    task: asyncio.Task | None = None  # of its present life
    watched: set[asyncio.Task] = field(default_factory=set)

    @property
    def node_id(self) -> str:
        assert self.info is not None, "the engine has not started"
        return self.info.node_id

    @property
    def ref(self) -> EngineRef:
        return EngineRef(engine_id=self.engine_id, incarnation=self.incarnation, actor=self.actor)


class Fleet:
    """Runs in the coordinator's event loop. `on_serving(slot)` and `on_lost(slot)` are called without a pause in
    between, so whoever asks sees a slot either with its work or without.
    """

    def __init__(
        self,
        spec: EngineSpec,
        catch_up: Callable[[Slot], Awaitable[bool]],
        on_serving: Callable[[Slot], None],
        on_lost: Callable[[Slot], None],
    ) -> None:
        """catch_up: gives a fresh engine the current weights; it is asked again until it says True."""
        self.spec = spec
        self.slots: dict[int, Slot] = {}
        self.faults: list[Fault] = []
        self.num_restarts = 0
        self._catch_up, self._on_serving, self._on_lost = catch_up, on_serving, on_lost
        self._changed = asyncio.Condition()
        self._watchdog: asyncio.Task | None = None
        self._tasks: set[asyncio.Task] = set()

    async def scale(self, num_engines: int) -> list[Slot]:
        """Starts the engines that are missing; raises what the first of them failed with. Returns those too many."""
        wanted = range(num_engines)
        missing = [i for i in wanted if i not in self.slots or self.slots[i].state == "failed"]
        for engine_id in missing:
            old = self.slots.get(engine_id)
            if old is not None:
                self.remove(old)  # nobody tries on
            self.slots[engine_id] = Slot(engine_id, incarnation=-1 if old is None else old.incarnation)
        if self._watchdog is None:
            self._watchdog = asyncio.create_task(self._watch_for_hangs())
        outcomes = await asyncio.gather(*(self._start(self.slots[i]) for i in missing), return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        if failures:
            for engine_id in missing:
                self.remove(self.slots[engine_id])
            raise failures[0]
        return [slot for engine_id, slot in self.slots.items() if engine_id not in wanted]

    def serving(self) -> list[Slot]:
        return [slot for slot in self.slots.values() if slot.state == "serving"]

    @property
    def num_starting(self) -> int:
        return sum(slot.state in ("starting", "failed") for slot in self.slots.values())

    async def wait_for_serving(self, besides: Callable[[], set[int]] = set) -> None:
        """Until an engine serves that is not among `besides()`; EngineError once that cannot be hoped for."""
        if self._serves(besides()):  # as nearly always: there may be a thousand engines, and this is asked all the time
            return

        def can_go_on() -> bool:
            hopeful = [slot for slot in self.slots.values() if slot.engine_id not in besides()]
            return any(slot.state == "serving" for slot in hopeful) or not any(s.state == "starting" for s in hopeful)

        async with self._changed:
            await self._changed.wait_for(can_go_on)
        if not self._serves(besides()):
            raise self._no_engine_left()

    def lose(self, engine_id: int, incarnation: int, cause: str, phase: Literal["serve", "hang"] = "serve") -> None:
        """Somebody found this life of an engine ended or stuck. It is replaced; a second report changes nothing."""
        slot = self.slots.get(engine_id)
        if slot is None or slot.incarnation != incarnation or slot.state != "serving":
            return
        self._note(slot, phase, cause)
        slot.state = "starting"
        self._on_lost(slot)
        _kill(slot.actor)
        self.num_restarts += 1
        self.spawn(self._replace(slot))

    def remove(self, slot: Slot) -> None:
        """Ends a slot for good."""
        slot.state = "retired"
        self.slots.pop(slot.engine_id, None)
        if slot.actor is not None:
            _kill(slot.actor)
        self.spawn(self.tell())

    def retire(self, slot: Slot) -> None:
        """From now on it is given no work and not replaced."""
        slot.state = "retired"
        self._on_lost(slot)

    def shutdown(self) -> list[Any]:
        """Kills all engines; their actors."""
        for task in self._tasks:
            task.cancel()
        actors = [slot.actor for slot in self.slots.values() if slot.actor is not None]
        for slot in self.slots.values():
            slot.state = "retired"
        for actor in actors:
            _kill(actor)
        return actors

    async def _start(self, slot: Slot) -> None:
        """One try: creates the actor, waits until it has a place and is ready, and catches it up."""
        slot.incarnation += 1
        began = time.monotonic()
        slot.actor = self.spec.create(slot.engine_id, slot.incarnation)
        name = f"engine {slot.engine_id}"
        try:
            await self._wait_for_place(slot)
            slot.info = await self._build(slot)
            while not await self._catch_up(slot):
                pass
        except Exception as error:
            raise translate(name, error) from error
        if slot.state == "retired":
            raise EngineError(f"{name} was given up while it started")
        self._check_fingerprint(slot)
        slot.state, slot.failure, slot.num_failed_starts = "serving", None, 0
        self._on_serving(slot)
        logger.info(
            "engine %d %s",
            slot.engine_id,
            "is replaced" if slot.incarnation else "has started",
            extra={**_life_of(slot), "seconds": round(time.monotonic() - began, 3)},
        )
        slot.task = self.spawn(self._wait_for_end(slot, slot.incarnation))
        await self.tell()

    async def _wait_for_place(self, slot: Slot) -> None:
        """Until its process runs. Ray keeps looking for a node all the while, one that joins the cluster included."""
        limit, spec = self.spec.start_seconds, self.spec
        try:
            await asyncio.wait_for(slot.actor.__ray_ready__.remote(), limit)
        except TimeoutError as error:
            bundle = f" in bundle {slot.engine_id} of its placement group" if slot.engine_id < spec.num_bundles else ""
            raise EngineUnplacedError(
                f"engine {slot.engine_id} has had no place in the cluster for {limit:g} s: it needs "
                f"{spec.num_cpus:g} CPUs and {spec.num_gpus:g} GPUs{bundle}, so add a node, or scale the pool down"
            ) from error

    async def _build(self, slot: Slot) -> EngineInfo:
        limit = self.spec.start_seconds
        try:
            return await asyncio.wait_for(slot.actor.start.remote(self.spec.config, self.spec.engine_factory), limit)
        except TimeoutError as error:
            raise EngineError(
                f"engine {slot.engine_id} is not ready after {limit:g} s: is there memory for it? "
                "Raise start_seconds if the model needs longer"
            ) from error

    def _check_fingerprint(self, slot: Slot) -> None:
        others = {one.info.kernel_fingerprint for one in self.serving() if one.info is not None}
        assert slot.info is not None
        if others - {slot.info.kernel_fingerprint}:
            raise ValueError(
                f"the engines have different kernel fingerprints, {sorted(others | {slot.info.kernel_fingerprint})}: "
                "their rollouts would differ in bits, so use machines of one kind and one version of the code"
            )

    async def _replace(self, slot: Slot) -> None:
        """Tries until it stands. For a place in the cluster it waits without a pause between two tries, since Ray asks
        an autoscaler for a node only while somebody waits for one."""
        while slot.state in ("starting", "failed"):
            num_late = slot.num_failed_starts - MAX_FAILED_STARTS
            if num_late >= 0:
                await asyncio.sleep(min(RETRY_SECONDS * 2**num_late, MAX_RETRY_SECONDS))
            try:
                await self._start(slot)
            except Exception as error:
                _kill(slot.actor)
                if slot.state != "retired":
                    await self._note_failed_start(slot, error)

    async def _note_failed_start(self, slot: Slot, error: Exception) -> None:
        self._note(slot, "start", str(error))
        slot.failure = error if isinstance(error, (EngineError, ValueError)) else EngineError(str(error))
        has_no_place = isinstance(error, EngineUnplacedError)
        slot.num_failed_starts += not has_no_place
        if slot.state == "starting" and (has_no_place or slot.num_failed_starts == MAX_FAILED_STARTS):
            slot.state = "failed"
            await self.tell()

    async def _wait_for_end(self, slot: Slot, incarnation: int) -> None:
        try:
            await slot.actor.wait_until_stopped.remote()
        except Exception as error:
            self.lose(slot.engine_id, incarnation, str(translate(f"engine {slot.engine_id}", error)))

    async def _watch_for_hangs(self) -> None:
        while True:
            await asyncio.sleep(min(WATCH_SECONDS, self.spec.hang_seconds / 4))
            for slot in self.serving():
                if not slot.watched:
                    task = self.spawn(self._look_at(slot, slot.incarnation))
                    slot.watched.add(task)
                    task.add_done_callback(slot.watched.discard)

    async def _look_at(self, slot: Slot, incarnation: int) -> None:
        limit = self.spec.hang_seconds
        try:
            progress = await asyncio.wait_for(slot.actor.progress.remote(), limit)
        except TimeoutError:
            self.lose(slot.engine_id, incarnation, f"its actor has not answered for {limit:g} s", "hang")
        except Exception:
            return  # it died: whoever waits for its end hears of it
        else:
            if progress.phase != "idle" and progress.seconds > limit:
                self.lose(slot.engine_id, incarnation, f"it hangs {progress}", "hang")

    def _note(self, slot: Slot, phase: Literal["start", "serve", "hang"], cause: str) -> None:
        fault = Fault(
            time=time.time(), engine_id=slot.engine_id, incarnation=slot.incarnation, phase=phase, cause=cause
        )
        self.faults.append(fault)
        what = "did not start" if phase == "start" else "is lost"
        fields = {**_life_of(slot), "phase": phase, "cause": cause}
        logger.warning("engine %d %s: %s", slot.engine_id, what, cause, extra=fields)

    def _serves(self, besides: set[int]) -> bool:
        return any(slot.state == "serving" and slot.engine_id not in besides for slot in self.slots.values())

    def _no_engine_left(self) -> EngineError | ValueError:
        failures = [slot.failure for slot in self.slots.values() if slot.failure is not None]
        if failures:
            return type(failures[0])(f"no engine is left to draw, and replacements fail: {failures[0]}")
        return EngineError("no engine is left to draw: the pool was scaled down to none, or is shutting down")

    async def tell(self) -> None:
        """Whoever waits for an engine looks again."""
        async with self._changed:
            self._changed.notify_all()

    def spawn(self, work: Any) -> asyncio.Task:
        task = asyncio.create_task(work)
        self._tasks.add(task)  # the loop itself keeps but a weak reference
        task.add_done_callback(self._tasks.discard)
        return task


def _life_of(slot: Slot) -> dict[str, int]:
    return {"engine_id": slot.engine_id, "incarnation": slot.incarnation}


def _kill(actor: Any) -> None:
    ray.kill(actor, no_restart=True)


def wait_until_dead(actors: Sequence[Any]) -> None:
    """Waits until Ray knows that killed actors are dead, for a while."""
    deadline = time.monotonic() + STOP_SECONDS
    for actor in actors:
        remaining = max(0.0, deadline - time.monotonic())
        ray.wait([actor.__ray_ready__.remote()], timeout=remaining)
