"""RolloutPool: the handle whose owner starts the engines and the coordinator on Ray, and ends them."""

from __future__ import annotations

import uuid
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, get_args

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from engine import EngineConfig
from engine.checkpoint import resolve_model
from engine.config import available_cores
from engine.model_config import ModelConfig
from rollout import cluster
from rollout.buffer import OnStale, StalenessLimit
from rollout.coordinator import PoolCoordinator, PoolFacts
from rollout.engine_actor import EngineFactory, EngineInfo
from rollout.fleet import EngineSpec, wait_until_dead
from rollout.handle import PoolHandle
from rollout.journalling import JournalPlan
from rollout.weight_transport import TRANSPORTS, WeightTransport

MAX_SEED = 2**64 - 1
PlacementStrategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


class RolloutPool(PoolHandle):
    """Deterministic engines behind one front. Use it as a context manager, or call `shutdown()`.

    The same `seed`, group ids, weights and parameters give the same rollouts, whatever `num_engines`, whatever runs
    beside them, and whichever of them die: an engine that dies, or hangs for `hang_seconds`, is replaced, takes the
    current weights, and its groups are drawn again or gone on with.

    Args:
        engine_cpus, engine_gpus: what Ray reserves for one engine; 0 CPUs let engines share cores with a trainer that
            works while they idle. An engine with a part of a GPU takes no more than that part of what
            `gpu_memory_utilization` gives it.
        placement: how a placement group lays the engines out over nodes; None spreads them where there is room.
        max_staleness, groups_per_version, on_stale: for `submit` and `collect`, see `StalenessLimit`.
        weight_transport: how `sync_weights` carries weights: "shared_memory" on one node, "broadcast" between nodes,
            "object_store" anywhere; "auto" takes the best there is.
        start_seconds: in which an engine must have a place in the cluster, and then again in which it must be ready.
        journal: a run directory in which every delivered group and every switch of weights is written down, for
            `python -m rollout.replay`. keep_weights_every: versions that it divides are kept there too, the latest
            `keep_last` of them; None keeps none.
        name: of the pool's actors, `NAME/coordinator` and `NAME/engine-I.LIFE`; made up if left out.
        engine_factory: builds what each actor steps; None builds an `LLMEngine`.
        wait_until_ready: False returns while the engines start, so that a trainer may start beside them; what needs
            them waits, as does `wait_until_ready()`.

    Raises ValueError for a model or option that cannot work, EngineError if an engine does not start.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_engines: int = 1,
        seed: int = 0,
        *,
        engine_cpus: float = 0.0,
        engine_gpus: float = 0.0,
        placement: PlacementStrategy | None = None,
        max_staleness: int | None = None,
        groups_per_version: int | None = None,
        on_stale: OnStale = "drop",
        start_seconds: float = 900.0,
        hang_seconds: float = 300.0,
        weight_transport: WeightTransport = "auto",
        journal: str | Path | None = None,
        keep_weights_every: int | None = None,
        keep_last: int | None = None,
        name: str | None = None,
        engine_factory: EngineFactory | None = None,
        wait_until_ready: bool = True,
    ) -> None:
        _check_options(num_engines, seed, engine_cpus, engine_gpus, placement)
        if weight_transport not in TRANSPORTS:
            raise ValueError(f"{weight_transport=} must be one of {', '.join(map(repr, TRANSPORTS))}")
        _check_seconds(start_seconds=start_seconds, hang_seconds=hang_seconds)
        if journal is None and not (keep_weights_every is None and keep_last is None):
            raise ValueError(f"{keep_weights_every=} and {keep_last=} need a journal: give its run directory")
        limit = _staleness_limit(max_staleness, groups_per_version, on_stale)
        directory = resolve_model(config.model)
        model_config = ModelConfig.from_directory(directory)
        config.resolve_max_model_len(model_config)
        config = _with_absolute_model(config)
        keep = {"keep_weights_every": keep_weights_every, "keep_last": keep_last}
        plan = None if journal is None else JournalPlan.of_run(journal, directory, config=config, seed=seed, **keep)
        self._coordinator: Any = None
        self._placement_group: Any = None
        self._resources = {"CPU": engine_cpus, "GPU": engine_gpus}
        # by other transports weights pass the object store only where something fails, and then it may spill to disk
        stored_bytes = cluster.weights_num_bytes(directory) if weight_transport == "object_store" else 0
        self._has_started_ray = cluster.connect(stored_bytes, num_cpus=available_cores())
        try:
            _check_capacity(num_engines, self._resources)
            if placement is not None:
                self._placement_group = _placement_group(num_engines, self._resources, placement, start_seconds)
            spec = EngineSpec(
                config=within_gpu_share(config, engine_gpus),
                engine_factory=engine_factory,
                runtime_env=cluster.actor_env(config.num_threads),
                num_cpus=engine_cpus,
                num_gpus=engine_gpus,
                pool_name=name or f"pool-{uuid.uuid4().hex[:8]}",
                placement_group=self._placement_group,
                num_bundles=0 if self._placement_group is None else num_engines,
                start_seconds=start_seconds,
                hang_seconds=hang_seconds,
            )
            self._coordinator = _start_coordinator(spec, weight_transport)
            super().__init__(
                config=config,
                seed=seed,
                vocab_size=model_config.vocab_size,
                coordinator=self._coordinator,
                staleness_limit=limit,
                pool_name=spec.pool_name,
            )
            self.coordinator.open.remote(num_engines, plan)
            if wait_until_ready:
                self.wait_until_ready()
        except BaseException:
            self.shutdown()
            raise

    def wait_until_ready(self) -> None:
        """Returns once the engines serve that the pool was made with.

        Raises EngineError if one does not start; the pool is then good for nothing but `shutdown()`.
        """
        self.facts  # noqa: B018

    @cached_property
    def facts(self) -> PoolFacts:
        self.tokenizer  # noqa: B018  (loaded meanwhile; a broken one is an error of the start)
        return self._ask("facts")

    def handle(self) -> PoolHandle:
        """A picklable handle, with which any actor or task may generate and sync."""
        return PoolHandle(
            config=self.config,
            seed=self.seed,
            vocab_size=self.vocab_size,
            coordinator=self.coordinator,
            staleness_limit=self.staleness_limit,
            pool_name=self.pool_name,
        )

    def scale(self, num_engines: int) -> list[EngineInfo]:
        """Starts or ends engines while the others go on; returns what the engines say that serve then.

        Groups of an engine that ends go on elsewhere, from the tokens that they have.
        Raises ValueError for a number that the cluster cannot hold, EngineError if an engine does not start.
        """
        _check_num_engines(num_engines)
        _check_capacity(num_engines, self._resources)
        self.wait_until_ready()
        return self._ask("scale", num_engines)

    def __reduce__(self) -> Any:
        raise TypeError("a RolloutPool cannot be sent to another process: send pool.handle()")

    def shutdown(self) -> None:
        """Ends engines and coordinator, and Ray if this pool started it. A second call does nothing."""
        coordinator, self._coordinator = self._coordinator, None
        if "_journal" in self.__dict__ and self._journal is not None:
            self._journal.close()
        if ray.is_initialized() and coordinator is not None:
            _end(coordinator)
        if ray.is_initialized() and self._placement_group is not None:
            ray.util.remove_placement_group(self._placement_group)
            self._placement_group = None
        if self._has_started_ray:
            self._has_started_ray = False
            cluster.disconnect()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()


def _check_options(
    num_engines: int, seed: int, engine_cpus: float, engine_gpus: float, placement: PlacementStrategy | None
) -> None:
    _check_num_engines(num_engines)
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to {MAX_SEED}")
    for name, value in (("engine_cpus", engine_cpus), ("engine_gpus", engine_gpus)):
        if not value >= 0:
            raise ValueError(f"{name}={value!r} must not be negative")
    if placement is None:
        return
    if placement not in get_args(PlacementStrategy):
        raise ValueError(f"placement={placement!r} must be one of {', '.join(map(repr, get_args(PlacementStrategy)))}")
    if not engine_cpus + engine_gpus:
        raise ValueError(f"placement={placement!r} needs something to reserve: set engine_cpus or engine_gpus")


def _check_num_engines(num_engines: int) -> None:
    if isinstance(num_engines, bool) or not isinstance(num_engines, int) or num_engines < 1:
        raise ValueError(f"num_engines={num_engines!r} must be an integer of at least 1")


def _check_seconds(**seconds: float) -> None:
    for name, value in seconds.items():
        if not value > 0:
            raise ValueError(f"{name}={value!r} must be above 0")


def _staleness_limit(
    max_staleness: int | None, groups_per_version: int | None, on_stale: OnStale
) -> StalenessLimit | None:
    if max_staleness is None:
        return None
    if groups_per_version is None:
        raise ValueError(f"max_staleness={max_staleness} needs groups_per_version: the groups that one version takes")
    return StalenessLimit(max_staleness=max_staleness, groups_per_version=groups_per_version, on_stale=on_stale)


def _with_absolute_model(config: EngineConfig) -> EngineConfig:
    """Workers have another working directory, so a path is made absolute; a hub id stays as it is."""
    path = Path(config.model).expanduser()
    return replace(config, model=str(path.resolve())) if path.exists() else config


def within_gpu_share(config: EngineConfig, engine_gpus: float) -> EngineConfig:
    """The config of an engine that has so much of a GPU: with a part of one it leaves the other parts their memory."""
    if not 0 < engine_gpus < 1:
        return config
    return replace(config, gpu_memory_utilization=config.gpu_memory_utilization * engine_gpus)


def _check_capacity(num_engines: int, resources: dict[str, float]) -> None:
    # Ray would wait for what is missing without a word
    for resource, option in (("CPU", "engine_cpus"), ("GPU", "engine_gpus")):
        available = ray.cluster_resources().get(resource, 0.0)
        if num_engines * resources[resource] > available:
            raise ValueError(
                f"num_engines={num_engines} with {option}={resources[resource]} need more than the cluster's "
                f"{available:g} {resource}s: lower one of them"
                + (" (engine_cpus=0 shares the cores)" if resource == "CPU" else "")
            )


def _placement_group(num_engines: int, resources: dict[str, float], strategy: PlacementStrategy, timeout: float) -> Any:
    bundle = {name: amount for name, amount in resources.items() if amount}
    group = ray.util.placement_group([bundle] * num_engines, strategy=strategy)
    if not group.wait(timeout):
        ray.util.remove_placement_group(group)
        raise ValueError(
            f"the cluster cannot place num_engines={num_engines} of {bundle} by placement={strategy!r}: lower what "
            "they need, add nodes, or choose another placement"
        )
    return group


def _start_coordinator(spec: EngineSpec, weight_transport: WeightTransport) -> Any:
    """On the caller's node, whose end is the pool's end in any case."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return PoolCoordinator.options(
        name=f"{spec.pool_name}/coordinator",
        scheduling_strategy=here,
        runtime_env=cluster.helper_env(),
    ).remote(spec, weight_transport)


def _end(coordinator: Any) -> None:
    """Kills the engines and their coordinator and waits until Ray knows that they are dead."""
    try:
        engines = ray.get(coordinator.shutdown.remote())
    except ray.exceptions.RayError:  # it is dead, and with it the engines that it owned
        engines = []
    ray.kill(coordinator)
    wait_until_dead([*engines, coordinator])
