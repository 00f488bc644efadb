"""RolloutPool: the handle whose owner starts the engines and the coordinator on Ray, and ends them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import ray
from ray.exceptions import RayError

from engine import EngineConfig, LLMEngine
from engine.checkpoint import resolve_model
from engine.config import available_cores
from engine.model_config import ModelConfig
from rollout import cluster
from rollout.coordinator import PoolCoordinator
from rollout.engine_actor import EngineActor, EngineFactory, EngineInfo
from rollout.errors import translate
from rollout.handle import PoolHandle

MAX_SEED = 2**64 - 1
STOP_SECONDS = 10.0


class RolloutPool(PoolHandle):
    """Deterministic engines behind one front. Use it as a context manager, or call `shutdown()`.

    The same `seed`, group ids, weights and parameters give the same rollouts, whatever `num_engines` and whatever runs
    beside them. `engine_cpus` is what Ray reserves for one engine: 0 lets engines share cores with a trainer that works
    while they idle. `engine_factory` builds what each actor steps.

    Raises ValueError for a model or option that cannot work, EngineError if an engine does not start.
    """

    def __init__(
        self,
        config: EngineConfig,
        num_engines: int = 1,
        seed: int = 0,
        *,
        engine_cpus: float = 0.0,
        engine_factory: EngineFactory = LLMEngine,
    ) -> None:
        _check_options(num_engines, seed, engine_cpus)
        directory = resolve_model(config.model)
        model_config = ModelConfig.from_directory(directory)
        config.resolve_max_model_len(model_config)
        config = _with_absolute_model(config)
        self._actors: list[Any] = []
        self._has_started_ray = cluster.connect(cluster.weights_num_bytes(directory), num_cpus=available_cores())
        try:
            _check_capacity(num_engines, engine_cpus)
            engines = [self._start_engine_actor(config, engine_cpus) for _ in range(num_engines)]
            coordinator = self._start_coordinator(engines)
            infos = _wait_for_start([engine.start.remote(config, engine_factory) for engine in engines])
            super().__init__(
                config=config,
                seed=seed,
                vocab_size=model_config.vocab_size,
                engines=engines,
                engine_infos=infos,
                coordinator=coordinator,
            )
            self.tokenizer  # noqa: B018  (loaded now, so that a broken one is an error of the start)
        except BaseException:
            self.shutdown()
            raise

    def handle(self) -> PoolHandle:
        """A picklable handle, with which any actor or task may generate and sync."""
        return PoolHandle(
            config=self.config,
            seed=self.seed,
            vocab_size=self.vocab_size,
            engines=self.engines,
            engine_infos=self.engine_infos,
            coordinator=self.coordinator,
        )

    def __reduce__(self) -> Any:
        raise TypeError("a RolloutPool cannot be sent to another process: send pool.handle()")

    def shutdown(self) -> None:
        """Ends engines and coordinator, and Ray if this pool started it. A second call does nothing."""
        actors, self._actors = self._actors, []
        if ray.is_initialized():
            _kill(actors)
        if self._has_started_ray:
            self._has_started_ray = False
            cluster.disconnect()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.shutdown()

    def _start_engine_actor(self, config: EngineConfig, engine_cpus: float) -> Any:
        engine = EngineActor.options(
            num_cpus=engine_cpus, scheduling_strategy="SPREAD", runtime_env=cluster.actor_env(config.num_threads)
        ).remote()
        self._actors.append(engine)
        return engine

    def _start_coordinator(self, engines: Sequence[Any]) -> Any:
        coordinator = PoolCoordinator.options(runtime_env=cluster.actor_env(num_threads=1)).remote(engines)
        self._actors.append(coordinator)
        return coordinator


def _check_options(num_engines: int, seed: int, engine_cpus: float) -> None:
    if isinstance(num_engines, bool) or not isinstance(num_engines, int) or num_engines < 1:
        raise ValueError(f"num_engines={num_engines!r} must be an integer of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed!r} must be an integer from 0 to {MAX_SEED}")
    if not engine_cpus >= 0:
        raise ValueError(f"engine_cpus={engine_cpus!r} must not be negative")


def _with_absolute_model(config: EngineConfig) -> EngineConfig:
    """Workers have another working directory, so a path is made absolute; a hub id stays as it is."""
    path = Path(config.model).expanduser()
    return replace(config, model=str(path.resolve())) if path.exists() else config


def _check_capacity(num_engines: int, engine_cpus: float) -> None:
    # Ray would wait for the missing CPUs without a word
    num_cpus = ray.cluster_resources().get("CPU", 0.0)
    if num_engines * engine_cpus > num_cpus:
        raise ValueError(
            f"num_engines={num_engines} with engine_cpus={engine_cpus} need more than the cluster's {num_cpus:g} CPUs: "
            "lower one of them (engine_cpus=0 shares the cores)"
        )


def _wait_for_start(starts: list[ray.ObjectRef]) -> list[EngineInfo]:
    infos = []
    for engine_index, start in enumerate(starts):
        try:
            infos.append(ray.get(start))
        except RayError as error:
            raise translate(f"engine {engine_index}", error) from error
    fingerprints = {info.kernel_fingerprint for info in infos}
    if len(fingerprints) > 1:
        raise ValueError(
            f"the engines have different kernel fingerprints, {sorted(fingerprints)}: their rollouts would differ in "
            "bits, so use machines of one kind and one version of the code"
        )
    return infos


def _kill(actors: Sequence[Any]) -> None:
    """Kills the actors and waits until Ray knows that they are dead."""
    for actor in actors:
        ray.kill(actor)
    deadline = time.monotonic() + STOP_SECONDS
    for actor in actors:
        remaining = max(0.0, deadline - time.monotonic())
        ray.wait([actor.__ray_ready__.remote()], timeout=remaining)
