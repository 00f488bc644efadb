"""Metrics: what Prometheus is shown of a pool, through the metrics agent that Ray runs on every node.

Ray puts `ray_` before each name. A label is a pool, an engine's number or one of a few words: their combinations are
bounded, which group and request ids are not.

What an engine counts is exported by the coordinator, which outlives engines: an engine that died shows 0 requests and
not the last it had, and its counters go on where they were. Only the two latencies come from the engine's own process.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from ray.util.metrics import Counter, Gauge, Histogram

from engine import Completion
from engine.outputs import EngineStats

if TYPE_CHECKING:
    from rollout.buffer import BufferStats
    from rollout.fleet import Fault
    from rollout.sync_report import SyncReport

EXPORT_SECONDS = 1.0  # between two looks at every engine; Ray itself reports every 10 s unless told otherwise
BOUNDARIES = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

MetricKind = Literal["gauge", "counter", "histogram"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricSpec:
    """One metric, as `docs/observing.md` lists it."""

    name: str
    kind: MetricKind
    labels: tuple[str, ...]
    meaning: str


def _specs(kind: MetricKind, labels: tuple[str, ...], meanings: dict[str, str]) -> list[MetricSpec]:
    return [MetricSpec(name=name, kind=kind, labels=labels, meaning=text) for name, text in meanings.items()]


_ENGINE_GAUGES = {  # by the field of EngineStats
    "num_requests_running": "lockstep_engine_requests_running",
    "num_requests_waiting": "lockstep_engine_requests_waiting",
    "kv_cache_usage": "lockstep_engine_kv_cache_usage_ratio",
}
_ENGINE_COUNTERS = {
    "num_preemptions": "lockstep_engine_preemptions_total",
    "prefix_cache_queries": "lockstep_engine_prefix_cache_queries_total",
    "prefix_cache_hits": "lockstep_engine_prefix_cache_hits_total",
    "num_steps": "lockstep_engine_steps_total",
    "num_scheduled_tokens": "lockstep_engine_scheduled_tokens_total",
    "num_generated_tokens": "lockstep_engine_generated_tokens_total",
    "num_evictions": "lockstep_engine_evictions_total",
}
_REQUEST_COUNTERS = {  # by the field of RequestTotals
    "num_finished": "lockstep_engine_requests_finished_total",
    "num_aborted": "lockstep_engine_requests_aborted_total",
}
_BUFFER_COUNTERS = {  # by the field of BufferStats
    "num_submitted": "lockstep_pool_groups_submitted_total",
    "num_collected": "lockstep_pool_groups_collected_total",
    "num_stale_dropped": "lockstep_staleness_groups_dropped_total",
    "num_stale_redrawn": "lockstep_staleness_groups_redrawn_total",
}

METRICS: dict[str, MetricSpec] = {
    spec.name: spec
    for spec in (
        *_specs(
            "gauge",
            ("pool", "engine_id"),
            {
                "lockstep_engine_requests_running": "samples that hold blocks, or wait for their group's prompt",
                "lockstep_engine_requests_waiting": "samples in the engine's queue",
                "lockstep_engine_kv_cache_usage_ratio": "share of the KV blocks in use, 0 to 1",
            },
        ),
        *_specs(
            "counter",
            ("pool", "engine_id"),
            {
                "lockstep_engine_preemptions_total": "samples that gave their blocks back to compute them again",
                "lockstep_engine_prefix_cache_queries_total": "prompt tokens looked up in the prefix cache",
                "lockstep_engine_prefix_cache_hits_total": "prompt tokens found there",
                "lockstep_engine_steps_total": "steps",
                "lockstep_engine_scheduled_tokens_total": "tokens computed, of prompts and completions",
                "lockstep_engine_generated_tokens_total": "tokens drawn",
                "lockstep_engine_evictions_total": "cached blocks that were given to others",
                "lockstep_engine_requests_finished_total": "samples that ended by themselves",
                "lockstep_engine_requests_aborted_total": "samples that were ended",
            },
        ),
        *_specs(
            "counter",
            ("pool", "engine_id", "part"),
            {"lockstep_engine_step_seconds_total": "seconds in a part of the steps; `sample` is a part of `execute`"},
        ),
        *_specs(
            "histogram",
            ("pool", "engine_id"),
            {
                "lockstep_engine_time_to_first_token_seconds": "of every sample, from arrival to its first token",
                "lockstep_engine_inter_token_seconds": "of every sample, from a token to the next, on average",
            },
        ),
        *_specs(
            "gauge",
            ("pool",),
            {
                "lockstep_pool_groups_running": "groups reserved or placed, by all handles",
                "lockstep_pool_engines_serving": "engines that take work",
                "lockstep_pool_engines_starting": "engines on their way, replacements among them",
                "lockstep_pool_policy_version": "the version in force",
            },
        ),
        *_specs(
            "counter",
            ("pool",),
            {
                "lockstep_pool_restarts_total": "engines replaced, because they died or hung",
                "lockstep_pool_redrawn_groups_total": "groups placed anew after one",
            },
        ),
        *_specs(
            "counter",
            ("pool", "phase"),
            {"lockstep_pool_faults_total": "what went wrong with engines, in phase `start`, `serve` or `hang`"},
        ),
        *_specs(
            "counter",
            ("pool",),
            {
                "lockstep_pool_groups_submitted_total": "groups given to `submit`",
                "lockstep_pool_groups_collected_total": "groups that `collect` has handed out",
                "lockstep_staleness_groups_dropped_total": "groups dropped because they were too old",
                "lockstep_staleness_groups_redrawn_total": "groups drawn again because they were too old",
            },
        ),
        *_specs(
            "gauge",
            ("pool",),
            {
                "lockstep_staleness_mean_versions": "age of the tokens of the last `collect`, on average",
                "lockstep_staleness_max_versions": "age of its oldest token",
                "lockstep_staleness_limit_versions": "`max_staleness`, where there is one",
            },
        ),
        *_specs(
            "counter",
            ("pool",),
            {
                "lockstep_sync_completed_total": "weight syncs",
                "lockstep_sync_failed_total": "weight syncs that were begun and raised",
                "lockstep_sync_seconds_total": "seconds from the first tensor read to the last acknowledgement",
                "lockstep_sync_bytes_total": "float32 bytes of one copy of the weights",
                "lockstep_sync_pause_seconds_total": "seconds in which no step could run, over all engines",
                "lockstep_sync_recomputed_tokens_total": "tokens whose KV running requests gave up",
            },
        ),
    )
}


class Metrics:
    """The metrics of one pool that this process exports; each is made when it is first used."""

    def __init__(self, pool: str) -> None:
        self._pool = pool
        self._made: dict[str, Any] = {}

    def set(self, name: str, value: float, **labels: str) -> None:
        self._find(name).set(value, self._tags(labels))

    def add(self, name: str, amount: float, **labels: str) -> None:
        if amount > 0:
            self._find(name).inc(amount, self._tags(labels))

    def observe(self, name: str, value: float, **labels: str) -> None:
        self._find(name).observe(value, self._tags(labels))

    def _tags(self, labels: dict[str, str]) -> dict[str, str]:
        return {"pool": self._pool, **labels}

    def _find(self, name: str) -> Any:
        if name not in self._made:
            spec = METRICS[name]
            if spec.kind == "histogram":
                self._made[name] = Histogram(name, spec.meaning, list(BOUNDARIES), spec.labels)
            else:
                make = Gauge if spec.kind == "gauge" else Counter
                self._made[name] = make(name, spec.meaning, spec.labels)
        return self._made[name]


class Totals:
    """Adds to counters what has come since they were last shown, for totals that begin at 0."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._last: dict[tuple[str, ...], float] = {}

    def show(self, name: str, total: float, **labels: str) -> None:
        key = (name, *labels.values())
        self._metrics.add(name, total - self._last.get(key, 0.0), **labels)
        self._last[key] = total


class EngineMetrics:
    """One life of an engine, as the coordinator exports it from what the engine says of itself."""

    def __init__(self, metrics: Metrics, engine_id: int) -> None:
        self._metrics, self._totals, self._engine_id = metrics, Totals(metrics), str(engine_id)

    def show(self, stats: EngineStats) -> None:
        for field, name in _ENGINE_GAUGES.items():
            self._metrics.set(name, getattr(stats, field), engine_id=self._engine_id)
        for field, name in _ENGINE_COUNTERS.items():
            self._totals.show(name, getattr(stats, field), engine_id=self._engine_id)
        for field, name in _REQUEST_COUNTERS.items():
            self._totals.show(name, getattr(stats.requests, field), engine_id=self._engine_id)
        for part, seconds in asdict(stats.step_seconds).items():
            self._totals.show("lockstep_engine_step_seconds_total", seconds, engine_id=self._engine_id, part=part)

    def show_lost(self) -> None:
        """It has ended: it runs nothing and holds nothing."""
        for name in _ENGINE_GAUGES.values():
            self._metrics.set(name, 0, engine_id=self._engine_id)


class PoolMetrics:
    """What the coordinator exports."""

    def __init__(self, pool: str) -> None:
        self._metrics = Metrics(pool)
        self._totals = Totals(self._metrics)
        self._engines: dict[tuple[int, int], EngineMetrics] = {}  # by engine id and incarnation
        self._num_faults = 0  # shown so far
        self._staleness: dict[str, float] = {}  # gauges by name

    def show_engine(self, engine_id: int, incarnation: int, stats: EngineStats) -> None:
        life = (engine_id, incarnation)
        if life not in self._engines:
            self._engines[life] = EngineMetrics(self._metrics, engine_id)
        self._engines[life].show(stats)

    def show_lost(self, engine_id: int, incarnation: int) -> None:
        engine = self._engines.pop((engine_id, incarnation), None)
        if engine is not None:
            engine.show_lost()

    def note_staleness(self, stats: BufferStats, max_staleness: int | None) -> None:
        """Of a handle, whose own process could not show it for long: Ray drops a gauge that is not set again."""
        self._staleness |= {
            "lockstep_staleness_mean_versions": stats.staleness_mean,
            "lockstep_staleness_max_versions": stats.staleness_max,
        }
        if max_staleness is not None:
            self._staleness["lockstep_staleness_limit_versions"] = max_staleness

    def show_pool(
        self,
        *,
        num_groups_running: int,
        num_engines_serving: int,
        num_engines_starting: int,
        policy_version: int,
        num_restarts: int,
        num_redrawn_groups: int,
        faults: Sequence[Fault],
    ) -> None:
        """faults: all there have been."""
        self._metrics.set("lockstep_pool_groups_running", num_groups_running)
        self._metrics.set("lockstep_pool_engines_serving", num_engines_serving)
        self._metrics.set("lockstep_pool_engines_starting", num_engines_starting)
        self._metrics.set("lockstep_pool_policy_version", policy_version)
        for name, value in self._staleness.items():
            self._metrics.set(name, value)
        self._totals.show("lockstep_pool_restarts_total", num_restarts)
        self._totals.show("lockstep_pool_redrawn_groups_total", num_redrawn_groups)
        for fault in faults[self._num_faults :]:
            self._metrics.add("lockstep_pool_faults_total", 1, phase=fault.phase)
        self._num_faults = len(faults)


class LatencyMetrics:
    """What an engine's own process exports, once for a sample that has ended."""

    def __init__(self, pool: str, engine_id: int) -> None:
        self._metrics, self._engine_id = Metrics(pool), str(engine_id)

    def show(self, completions: Iterable[Completion]) -> None:
        for completion in completions:
            timing = completion.timing
            if timing is None or completion.finish_reason == "abort":
                continue
            self._observe("lockstep_engine_time_to_first_token_seconds", timing.time_to_first_token)
            self._observe("lockstep_engine_inter_token_seconds", timing.mean_inter_token)

    def _observe(self, name: str, seconds: float | None) -> None:
        if seconds is not None:
            self._metrics.observe(name, seconds, engine_id=self._engine_id)


class HandleMetrics:
    """What a handle's process exports, of its `submit`, `collect` and `sync_weights`."""

    def __init__(self, pool: str) -> None:
        self._metrics = Metrics(pool)
        self._totals = Totals(self._metrics)

    def show_buffer(self, stats: BufferStats) -> None:
        for field, name in _BUFFER_COUNTERS.items():
            self._totals.show(name, getattr(stats, field))

    def show_sync(self, report: SyncReport) -> None:
        self._metrics.add("lockstep_sync_completed_total", 1)
        self._metrics.add("lockstep_sync_seconds_total", report.seconds)
        self._metrics.add("lockstep_sync_bytes_total", report.bytes)
        self._metrics.add("lockstep_sync_pause_seconds_total", sum(report.pause_seconds))
        self._metrics.add("lockstep_sync_recomputed_tokens_total", report.num_recomputed_tokens)

    def show_failed_sync(self) -> None:
        self._metrics.add("lockstep_sync_failed_total", 1)
