"""Comparison: the loads (a), (b) and (c), each given to every variant in turns, as tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from scripts.bench_scheduling import loads
from scripts.bench_scheduling.loads import Load
from scripts.bench_scheduling.replay import Figures, median_figures, replay
from scripts.bench_scheduling.variants import CUT, TINY, V0, VARIANTS, WIDE, Setting, Variant, run, shape_of, start

BLOCKS = 4096  # of 16 tokens: room for every load to run in without preemption
STREAM = Setting(
    model=WIDE,
    max_model_len=loads.DOCUMENT_TOKENS + 64,
    options={"num_blocks": BLOCKS, "max_num_batched_tokens": 1024, "long_prefill_token_threshold": 128},
)
GROUPS = Setting(
    model=CUT, max_model_len=loads.DOCUMENT_TOKENS + 64, options={"num_blocks": 5120, "max_num_batched_tokens": 2048}
)
BURST = Setting(
    model=TINY, max_model_len=128, options={"num_blocks": 2560, "max_num_seqs": 256, "max_num_batched_tokens": 2048}
)
STAND_IN_SECONDS = (0.0005, 0.002, 0.01)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Figures by variant, in order of the turns."""

    title: str
    turns: Mapping[str, Sequence[Figures]]

    def over_v0(self, name: str, figure: str) -> float:
        """The variant's figure over that of the V0-style loop in the same turn; the median."""
        pairs = zip(self.turns[name], self.turns[V0.name], strict=True)
        return median(getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs)

    def table(self) -> Table:
        headings = (
            "requests/s", "/ V0", "tokens/s", "between tokens, ms, P50", "P99", "V0 /", "longest",
            "first token, ms, P99", "peak blocks",
        )  # fmt: skip
        table = Table("", *headings, title=self.title, box=SIMPLE_HEAD)
        for name, turns in self.turns.items():
            row = median_figures(turns)
            ratios = self.over_v0(name, "requests_per_second"), 1 / self.over_v0(name, "between_tokens_p99")
            table.add_row(
                name, f"{row.requests_per_second:.2f}", f"{ratios[0]:.2f}", f"{row.tokens_per_second:.0f}",
                f"{row.between_tokens_p50:.1f}", f"{row.between_tokens_p99:.1f}", f"{ratios[1]:.1f}",
                f"{row.between_tokens_max:.0f}", f"{row.first_token_p99:.0f}", f"{row.peak_blocks:.0f}",
            )  # fmt: skip
        return table

    def as_json(self) -> dict[str, Any]:
        return {
            "load": self.title,
            "turns": {name: [asdict(figures) for figures in turns] for name, turns in self.turns.items()},
            "requests_per_second_over_v0": {name: self.over_v0(name, "requests_per_second") for name in self.turns},
            "between_tokens_p99_over_v0": {name: self.over_v0(name, "between_tokens_p99") for name in self.turns},
        }


def compare(
    setting: Setting,
    make_load: Callable[[int], Load],
    warm_up: Load,
    repetitions: int,
    variants: Sequence[Variant] = VARIANTS,
) -> Comparison:
    """Turn i has the load of seed i; who begins changes from turn to turn."""
    turns: dict[str, list[Figures]] = {variant.name: [] for variant in variants}
    for turn in range(repetitions):
        load = make_load(turn)
        for variant in (*variants[turn % len(variants) :], *variants[: turn % len(variants)]):
            turns[variant.name].append(run(setting, variant, warm_up, load))
    return Comparison(title=f"{load.title}; {shape_of(setting.model)}", turns=turns)


def compare_stream(seconds: float, model: Mapping[str, Any], options: Mapping[str, Any]) -> Comparison:
    """(a): chats, and documents that take half of the capacity, as found by running each kind alone."""
    setting = _with_options(replace(STREAM, model=model), options)
    chats, documents = (share / cost for share, cost in zip((loads.CHAT_SHARE, loads.DOCUMENT_SHARE), costs(setting)))
    warm_up = loads.groups(2, 1, 8, loads.DOCUMENT_TOKENS, seed=1000)
    return compare(setting, lambda seed: loads.stream(seconds, chats, documents, seed), warm_up, repetitions=1)


def costs(setting: Setting) -> tuple[float, float]:
    """Seconds of an otherwise idle machine: of a chat among 32 at once, and of a document's prompt."""
    loop, block_pool = start(setting, V0)
    chats = [loads.burst(32, loads.CHAT_TOKENS, loads.CHAT_NEW_TOKENS, seed) for seed in range(4)]
    documents = [loads.burst(1, loads.DOCUMENT_TOKENS, 1, seed) for seed in range(4)]
    chat_seconds, document_seconds = (
        [replay(loop, block_pool, load).seconds / load.num_requests for load in kind] for kind in (chats, documents)
    )
    return min(chat_seconds), min(document_seconds)


def compare_groups(repetitions: int, options: Mapping[str, Any]) -> Comparison:
    """(b): long prompts with several samples."""
    warm_up = loads.groups(1, 4, 16, loads.DOCUMENT_TOKENS, seed=1000)
    return compare(
        _with_options(GROUPS, options),
        lambda seed: loads.groups(4, 4, 64, loads.DOCUMENT_TOKENS, seed),
        warm_up,
        repetitions,
    )


def compare_burst(step_seconds: float, repetitions: int) -> Comparison:
    """(c): many short requests on a stand-in for a device."""
    setting = replace(BURST, step_seconds=step_seconds)
    warm_up = loads.burst(64, 16, 16, seed=1000)
    comparison = compare(setting, lambda seed: loads.burst(512, 64, 64, seed), warm_up, repetitions)
    return Comparison(title=f"{comparison.title}, a step takes {1e3 * step_seconds:g} ms", turns=comparison.turns)


def _with_options(setting: Setting, options: Mapping[str, Any]) -> Setting:
    return replace(setting, options={**setting.options, **options})
