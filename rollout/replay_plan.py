"""Replay plan: which rollouts of a journal can be drawn again, from which weights, and why others cannot."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rollout.journal import RunJournal
from rollout.journal_format import JournalHeader, JournalledGroup, JournalledSample
from rollout.redraw import Redraw, redraws_of


@dataclass(frozen=True, slots=True, kw_only=True)
class RetainedWeights:
    """Where a version's weights are."""

    directory: Path | None  # None for version 0, which the model itself holds
    checksum: str  # hex, by which the journal knows them


@dataclass(frozen=True, slots=True, kw_only=True)
class Selection:
    """What is to be drawn again; the defaults are everything."""

    group_id: str | None = None
    index: int | None = None
    policy_version: int | None = None  # of each rollout, only the tokens of this version

    def samples(self, group: JournalledGroup) -> Iterator[JournalledSample]:
        if self.group_id is not None and group.group_id != self.group_id:
            return
        for sample in group.samples:
            has_index = self.index is None or sample.index == self.index
            if has_index and (self.policy_version is None or self.policy_version in sample.policy_versions):
                yield sample

    def versions(self, sample: JournalledSample) -> set[int]:
        """Whose weights are needed to draw what is selected of the sample."""
        return set(sample.policy_versions) if self.policy_version is None else {self.policy_version}


class VersionCatalogue:
    """The versions that a journal names: where each one's weights are, or why there are none.

    A version is not to be had if it was not kept, or if the journal has two sets of weights under its number, as after
    a rollback: a token's stamp does not tell them apart.
    """

    def __init__(self, journal: RunJournal) -> None:
        self.retained: dict[int, RetainedWeights] = {}
        self._why_gone: dict[int, str] = {}
        checksums: dict[int, set[str]] = {0: {file.header.weights_checksum for file in journal.files}}
        directories: dict[int, Path | None] = {0: None}
        for switch in journal.switches():
            checksums.setdefault(switch.policy_version, set()).add(switch.checksum)
            directory = switch.weights_path and journal.run_directory / switch.weights_path
            directories[switch.policy_version] = directory or directories.get(switch.policy_version)
        for version, found in sorted(checksums.items()):
            self._add(version, found, directories[version])

    def why_not(self, version: int) -> str | None:
        """Why the version's weights are not to be had; None where they are."""
        if version in self.retained:
            return None
        return self._why_gone.get(version, f"the journal has no switch to version {version}")

    def _add(self, version: int, checksums: set[str], directory: Path | None) -> None:
        if len(checksums) > 1:
            self._why_gone[version] = f"version {version} names {len(checksums)} different sets of weights"
        elif version > 0 and directory is None:
            self._why_gone[version] = f"version {version} was not kept"
        elif directory is not None and not directory.is_dir():
            self._why_gone[version] = f"version {version} is gone from {directory}"
        else:
            self.retained[version] = RetainedWeights(directory=directory, checksum=next(iter(checksums)))


@dataclass(frozen=True, slots=True)
class Setup:
    """What of an engine decides about bits: rollouts of one setup are drawn again by one engine."""

    model: str
    profile: str
    kernel_fingerprint: str
    max_model_len: int | None

    @classmethod
    def of(cls, header: JournalHeader) -> Setup:
        max_model_len = header.engine_options["max_model_len"]
        return cls(header.model, header.profile, header.kernel_fingerprint, max_model_len)


class ReplayPlan:
    """Everything selected, gone through once: counts, and the needed versions of each setup in ascending order.

    Raises ValueError where nothing is selected, or a version is asked for that is not to be had.
    """

    def __init__(self, journal: RunJournal, selection: Selection) -> None:
        self.journal = journal
        self.selection = selection
        self.catalogue = VersionCatalogue(journal)
        self.num_replayable = 0
        self.why_not: dict[str, int] = {}  # reason -> rollouts that cannot be drawn again for it
        self.versions: dict[Setup, set[int]] = {}
        self._check_version()
        for file in journal.files:
            versions = self.versions.setdefault(Setup.of(file.header), set())
            for group in file.groups():
                for sample in selection.samples(group):
                    self._count(sample, versions)
        if not self.num_replayable and not self.why_not:
            raise ValueError(f"the journal in {journal.run_directory} has no rollout {_describe(selection)}")

    def headers(self) -> Mapping[Setup, JournalHeader]:
        return {Setup.of(file.header): file.header for file in reversed(self.journal.files)}

    def redraws(self, setup: Setup, version: int) -> Iterator[Redraw]:
        """All that is to be drawn under a version, read from the journal as it is asked for."""
        for file_number, file in enumerate(self.journal.files):
            if Setup.of(file.header) != setup or version not in file.policy_versions:
                continue
            for group_number, group in enumerate(file.groups()):
                samples = [sample for sample in self.selection.samples(group) if self._obstacle(sample) is None]
                yield from redraws_of((file_number, group_number), group, samples, version)

    def _count(self, sample: JournalledSample, versions: set[int]) -> None:
        reason = self._obstacle(sample)
        if reason is None:
            self.num_replayable += 1
            versions |= self.selection.versions(sample)
        else:
            self.why_not[reason] = self.why_not.get(reason, 0) + 1

    def _obstacle(self, sample: JournalledSample) -> str | None:
        if not sample.token_ids:
            return "aborted before the first token"
        if not sample.is_exact:
            return "inexact: went on with keys and values of older weights (mode='keep')"
        reasons = (self.catalogue.why_not(version) for version in sorted(self.selection.versions(sample)))
        return next((reason for reason in reasons if reason is not None), None)

    def _check_version(self) -> None:
        version = self.selection.policy_version
        reason = None if version is None else self.catalogue.why_not(version)
        if reason is not None:
            retained = ", ".join(map(str, self.catalogue.retained))
            raise ValueError(f"policy_version={version} cannot be drawn again: {reason}. Versions at hand: {retained}")


def _describe(selection: Selection) -> str:
    words = []
    if selection.group_id is not None:
        words.append(selection.group_id if selection.index is None else f"{selection.group_id}/{selection.index}")
    if selection.policy_version is not None:
        words.append(f"with tokens of version {selection.policy_version}")
    return " ".join(words) or "at all"
