"""`python -m rollout.replay RUN_DIR`: draws the rollouts of a run's journal again and compares every bit."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count

from engine import Completion, EngineConfig, LLMEngine
from engine.checkpoint import iter_weights
from rollout.journal import JournalError, JournalHeader, RunJournal, read_journal
from rollout.redraw import Difference, Redraw
from rollout.replay_plan import ReplayPlan, RetainedWeights, Selection, Setup

QUEUE_DEPTH = 2  # samples in the engine, as a multiple of those that run at once

RolloutKey = tuple[int, int, int]  # file, group and sample, by place in the journal


@dataclass(slots=True, kw_only=True)
class ReplayReport:
    """What a replay found."""

    journal: RunJournal
    num_replayable: int  # rollouts that were drawn again
    not_replayable: Mapping[str, int]  # reason -> rollouts
    num_tokens: int = 0  # that were compared
    differences: dict[RolloutKey, Difference] = field(default_factory=dict)  # the first of each rollout that differs

    @property
    def num_equal(self) -> int:
        return self.num_replayable - len(self.differences)

    def note(self, key: RolloutKey, difference: Difference) -> None:
        known = self.differences.get(key)
        if known is None or difference.position < known.position:
            self.differences[key] = difference


def replay(
    journal: RunJournal,
    selection: Selection | None = None,
    *,
    model: str | None = None,
    progress: Callable[[str], None] = lambda line: None,
) -> ReplayReport:
    """Draws again what is selected of a run's journal, version by version, and compares.

    A rollout of several versions is drawn in segments: under each version from the journalled prefix to where the next
    one came. model: where the model of version 0 is now, if it has moved. progress: hears of every version.

    Raises:
        ValueError: where nothing is selected, the kernels here are not those of the run, or weights are not those that
            the journal names.
        JournalError: for a damaged journal.
    """
    plan = ReplayPlan(journal, selection or Selection())
    report = ReplayReport(journal=journal, num_replayable=plan.num_replayable, not_replayable=plan.why_not)
    for setup, header in plan.headers().items():
        if plan.versions[setup]:
            _replay_setup(plan, setup, _make_engine(header, model), report, progress)
    return report


def describe(report: ReplayReport) -> str:
    """Every rollout that differs, then the counts."""
    lines = [str(difference) for _, difference in sorted(report.differences.items())]
    for file in report.journal.files:
        if file.num_torn_bytes:
            lines.append(f"{file.path.name}: dropped {file.num_torn_bytes} bytes of a record that was cut off")
    lines += [f"{path.name}: dropped, not even its header is whole" for path in report.journal.torn_files]
    lines.append(f"equal           {report.num_equal:,} rollouts ({report.num_tokens:,} tokens compared)")
    lines.append(f"differ          {len(report.differences):,}")
    lines.append(f"not replayable  {sum(report.not_replayable.values()):,}")
    lines += [f"    {number:,}: {reason}" for reason, number in sorted(report.not_replayable.items())]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        journal = read_journal(options.run_directory)
        selection = _selection(journal, options.rollout, options.policy_version)
        report = replay(journal, selection, model=options.model, progress=print)
    except (ValueError, JournalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(describe(report))
    if not report.num_replayable:
        print("error: nothing that was selected can be drawn again", file=sys.stderr)
        return 2
    return 1 if report.differences else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m rollout.replay",
        description=__doc__,
        epilog="Exit status: 0 all equal, 1 some differ, 2 nothing could be compared.",
    )
    parser.add_argument("run_directory", metavar="RUN_DIR", help="the run directory, which holds journal/")
    parser.add_argument("--rollout", metavar="GROUP_ID[/INDEX]", help="one group, or one sample of it")
    parser.add_argument("--policy-version", type=int, metavar="V", help="only tokens that were drawn under version V")
    parser.add_argument("--model", help="where the run's model is now, if it has moved")
    return parser


def _selection(journal: RunJournal, rollout: str | None, policy_version: int | None) -> Selection:
    """A group id may itself end in "/3": the whole text is a group if there is such a group."""
    if rollout is None or "/" not in rollout or _has_group(journal, rollout):
        return Selection(group_id=rollout, policy_version=policy_version)
    group_id, _, index = rollout.rpartition("/")
    if not index.isdecimal():
        return Selection(group_id=rollout, policy_version=policy_version)
    return Selection(group_id=group_id, index=int(index), policy_version=policy_version)


def _has_group(journal: RunJournal, group_id: str) -> bool:
    return any(group.group_id == group_id for file in journal.files for group in file.groups())


def _make_engine(header: JournalHeader, model: str | None) -> LLMEngine:
    """The run's engine, with the threads of this machine."""
    here = {"model": model or header.model, "num_threads": None, "trace_path": None}
    try:
        config = EngineConfig(**{**header.engine_options, **here})
    except TypeError as error:
        raise ValueError(f"the journal is of another version of the code: {error}") from error
    engine = LLMEngine(config)
    if engine.kernel_fingerprint != header.kernel_fingerprint:
        raise ValueError(
            f"the kernels here ({config.profile_name}) have fingerprint {engine.kernel_fingerprint}, those of the run "
            f"({header.profile}) {header.kernel_fingerprint}: bits are comparable only where they are equal. Use the "
            "run's version of the code, on its kind of device"
        )
    return engine


def _replay_setup(
    plan: ReplayPlan, setup: Setup, engine: LLMEngine, report: ReplayReport, progress: Callable[[str], None]
) -> None:
    for version in sorted(plan.versions[setup]):
        start, num_tokens = time.perf_counter(), 0
        _load(engine, version, plan.catalogue.retained[version])
        for redraw, completion in _draw(engine, plan.redraws(setup, version)):
            num_tokens += redraw.segment(completion.index).num_tokens
            difference = redraw.compare(completion)
            if difference is not None:
                report.note((*redraw.place, completion.index), difference)
        report.num_tokens += num_tokens
        progress(f"version {version}: {num_tokens:,} tokens compared in {time.perf_counter() - start:.1f} s")


def _load(engine: LLMEngine, version: int, weights: RetainedWeights) -> None:
    if weights.directory is not None:
        engine.update_weights(iter_weights(weights.directory), version)
    if engine.weights_checksum.hex() != weights.checksum:
        place = weights.directory or engine.config.model
        raise ValueError(
            f"the weights in {place} have checksum {engine.weights_checksum.hex()}, version {version} of the journal "
            f"{weights.checksum}: they were changed since. Restore them"
            + (" or name the run's model with --model" if weights.directory is None else " or move them away")
        )


def _draw(engine: LLMEngine, redraws: Iterator[Redraw]) -> Iterator[tuple[Redraw, Completion]]:
    """Draws many groups side by side, holding only what is in the engine; each sample comes out as it ends."""
    names = count()
    running: dict[str, Redraw] = {}
    num_open: Counter[str] = Counter()  # samples of each request that runs
    while True:
        while num_open.total() < QUEUE_DEPTH * engine.config.max_num_seqs and (redraw := next(redraws, None)):
            name = f"replay-{next(names)}"
            engine.add_request(name, redraw.group.prompt_token_ids, redraw.params, resume=redraw.resume())
            running[name], num_open[name] = redraw, len(redraw.segments)
        if not running:
            return
        for completion in engine.step().finished:
            name = completion.request_id
            yield running[name], completion
            num_open[name] -= 1
            if not num_open[name]:
                del running[name], num_open[name]


if __name__ == "__main__":
    sys.exit(main())
