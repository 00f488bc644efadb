"""Replay: gives a load to a loop by the clock, and says what its callers saw."""

from __future__ import annotations

import gc
import statistics
import time
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np

from engine import SamplingParams
from engine.block_pool import BlockPool
from engine.outputs import NewToken, StepOutput
from scripts.bench_scheduling.loads import Load


class Loop(Protocol):
    """What is timed: LLMEngine, or the V0-style loop."""

    def add_request(self, request_id: str, prompt: list[int], params: SamplingParams) -> None: ...

    def step(self) -> StepOutput: ...

    def has_unfinished(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """What happened, by the clock of the replay."""

    seconds: float  # from the start to the last token
    token_seconds: Mapping[tuple[int, int], Sequence[float]]  # by (place of the arrival, sample): when tokens came out
    peak_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """A row of the table; latencies in milliseconds."""

    requests_per_second: float
    tokens_per_second: float
    between_tokens_p50: float
    between_tokens_p99: float
    longest_gap_p50: float  # over requests, of the longest wait of each between two of its tokens
    longest_gap_p99: float
    first_token_p99: float
    peak_blocks: float


@contextmanager
def frozen_heap() -> Iterator[None]:
    """As an engine's process does: garbage collections leave alone what was there before."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@frozen_heap()
def replay(loop: Loop, block_pool: BlockPool, load: Load) -> Record:
    """Runs the load to its end. A request is added before the first step that starts after its arrival."""
    queue = deque(enumerate(load.arrivals))
    outputs: list[tuple[float, list[NewToken]]] = []
    peak_blocks = 0
    start = time.perf_counter()
    while queue or loop.has_unfinished():
        now = time.perf_counter() - start
        while queue and queue[0][1].seconds <= now:
            place, arrival = queue.popleft()
            loop.add_request(str(place), arrival.prompt_token_ids, arrival.params)
        if not loop.has_unfinished():
            time.sleep(queue[0][1].seconds - now)
            continue
        new_tokens = loop.step().new_tokens
        outputs.append((time.perf_counter() - start, new_tokens))
        peak_blocks = max(peak_blocks, block_pool.num_blocks - block_pool.num_free_blocks)
    return Record(seconds=outputs[-1][0], token_seconds=_by_sample(outputs), peak_blocks=peak_blocks)


def figures_of(record: Record, load: Load) -> Figures:
    """Throughput of the whole load, latencies of the requests that it watches."""
    watched = {key: times for key, times in record.token_seconds.items() if _kind(load, key) == load.watched}
    gaps_of = [gaps for times in watched.values() if (gaps := between_tokens(times))]
    gaps = [gap for gaps in gaps_of for gap in gaps]
    longest = [max(gaps) for gaps in gaps_of]
    first = [times[0] - load.arrivals[place].seconds for (place, _), times in watched.items()]
    return Figures(
        requests_per_second=load.num_requests / record.seconds,
        tokens_per_second=sum(map(len, record.token_seconds.values())) / record.seconds,
        between_tokens_p50=1e3 * percentile(gaps, 50),
        between_tokens_p99=1e3 * percentile(gaps, 99),
        longest_gap_p50=1e3 * percentile(longest, 50),
        longest_gap_p99=1e3 * percentile(longest, 99),
        first_token_p99=1e3 * percentile(first, 99),
        peak_blocks=record.peak_blocks,
    )


def between_tokens(times: Sequence[float]) -> list[float]:
    """What a reader waits for each token after the first; nothing, where several come out together."""
    return [later - earlier for earlier, later in pairwise(times)]


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest values; 0 where there are none."""
    return float(np.percentile(values, percent)) if len(values) else 0.0


def median_figures(turns: Sequence[Figures]) -> Figures:
    """Each figure's median over the turns."""
    columns = [asdict(turn) for turn in turns]
    return Figures(**{name: statistics.median(column[name] for column in columns) for name in columns[0]})


def _by_sample(outputs: Sequence[tuple[float, list[NewToken]]]) -> dict[tuple[int, int], list[float]]:
    token_seconds: defaultdict[tuple[int, int], list[float]] = defaultdict(list)
    for seconds, new_tokens in outputs:
        for token in new_tokens:
            token_seconds[int(token.request_id), token.index].append(seconds)
    return dict(token_seconds)


def _kind(load: Load, key: tuple[int, int]) -> str:
    return load.arrivals[key[0]].kind
