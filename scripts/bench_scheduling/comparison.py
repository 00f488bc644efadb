"""Comparison: a load given to every variant in turns, as a table; and the loads (b) and (c)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from scripts.bench_scheduling import loads
from scripts.bench_scheduling.loads import Load
from scripts.bench_scheduling.replay import Figures, median_figures
from scripts.bench_scheduling.variants import CUT, TINY, V0, VARIANTS, Setting, Variant, run, shape_of

BLOCKS = 4096  # of 16 tokens: room for every load to run in without preemption
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

    def over_v0(self, name: str, figure: str) -> list[float]:
        """The variant's figure over that of the V0-style loop, turn by turn."""
        pairs = zip(self.turns[name], self.turns[V0.name])  # a variant may take part in the first turns only
        return [getattr(ours, figure) / getattr(theirs, figure) for ours, theirs in pairs]

    def table(self) -> Table:
        headings = (
            "turns", "requests/s", "/ V0", "tokens/s", "tokens, ms, P50", "P99", "V0 /",
            "longest gap, ms, P50", "P99", "V0 /", "first, ms, P99", "blocks",
        )  # fmt: skip
        table = Table("", *headings, title=self.title, box=SIMPLE_HEAD)
        for name, turns in self.turns.items():
            row = median_figures(turns)
            table.add_row(
                name, str(len(turns)), f"{row.requests_per_second:.2f}", self._ratio(name, "requests_per_second"),
                f"{row.tokens_per_second:.0f}", f"{row.between_tokens_p50:.1f}", f"{row.between_tokens_p99:.1f}",
                self._ratio(name, "between_tokens_p99", inverse=True), f"{row.longest_gap_p50:.1f}",
                f"{row.longest_gap_p99:.1f}", self._ratio(name, "longest_gap_p99", inverse=True),
                f"{row.first_token_p99:.0f}", f"{row.peak_blocks:.0f}",
            )  # fmt: skip
        return table

    def _ratio(self, name: str, figure: str, inverse: bool = False) -> str:
        """Median and range over the turns."""
        ratios = sorted(1 / ratio if inverse else ratio for ratio in self.over_v0(name, figure))
        if len(ratios) == 1:
            return f"{ratios[0]:.2f}"
        return f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"

    def as_json(self) -> dict[str, Any]:
        figures = ("requests_per_second", "between_tokens_p99", "longest_gap_p99")
        return {
            "load": self.title,
            "turns": {name: [asdict(figures) for figures in turns] for name, turns in self.turns.items()},
            "over_v0": {name: {figure: self.over_v0(name, figure) for figure in figures} for name in self.turns},
        }


def compare(
    setting: Setting,
    make_load: Callable[[int], Load],
    warm_up: Load,
    repetitions: int,
    variants_of: Callable[[int], Sequence[Variant]] = lambda turn: VARIANTS,
) -> Comparison:
    """Turn i has the load of seed i; who begins changes from turn to turn."""
    turns: dict[str, list[Figures]] = {variant.name: [] for variant in variants_of(0)}
    for turn in range(repetitions):
        load, variants = make_load(turn), variants_of(turn)
        first = turn % len(variants)
        for variant in (*variants[first:], *variants[:first]):
            turns[variant.name].append(run(setting, variant, warm_up, load))
    return Comparison(title=f"{load.title}; {shape_of(setting.model)}", turns=turns)


def compare_groups(repetitions: int, options: Mapping[str, Any]) -> Comparison:
    """(b): long prompts with several samples."""
    warm_up = loads.groups(1, 4, 16, loads.DOCUMENT_TOKENS, seed=1000)
    return compare(
        with_options(GROUPS, options),
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


def with_options(setting: Setting, options: Mapping[str, Any]) -> Setting:
    return replace(setting, options={**setting.options, **options})
