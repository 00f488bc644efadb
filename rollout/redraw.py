"""Redraw: one engine request that draws a part of a journalled group again, and the comparison bit by bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from engine import Completion, SamplingParams
from rollout.journal_format import JournalledGroup, JournalledSample


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """Tokens of one sample that follow each other and were drawn under one version: `start` <= position < `end`."""

    sample: JournalledSample
    policy_version: int
    start: int
    end: int

    @property
    def num_tokens(self) -> int:
        return self.end - self.start

    @property
    def ends_by_itself(self) -> bool:
        """Whether a stop rule or a limit ended the sample here, and not new weights or an abort."""
        return self.end == len(self.sample.token_ids) and self.sample.finish_reason != "abort"

    def max_tokens(self, params: SamplingParams) -> int:
        """How many tokens the sample may have, prefix included, when the segment is drawn again."""
        return params.max_tokens if self.ends_by_itself else self.end


@dataclass(frozen=True, slots=True)
class DrawnToken:
    token_id: int
    logprob: float

    def __str__(self) -> str:
        return f"token {self.token_id}, logprob {self.logprob!r} (bits {int(_bits([self.logprob])[0]):08x})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """The first place at which a sample, drawn again, is not what the journal says."""

    group_id: str
    index: int
    policy_version: int
    position: int  # among the completion's tokens
    journalled: DrawnToken | str  # a text where it is not about a token: how the sample ended
    redrawn: DrawnToken | str

    def __str__(self) -> str:
        return (
            f"{self.group_id}/{self.index} differs at position {self.position} (version {self.policy_version}): "
            f"journal {self.journalled}; drawn again {self.redrawn}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Redraw:
    """Segments of one group that are drawn together: they are of one version and have one limit."""

    place: tuple[int, int]  # of the group in the journal: file, and group in the file
    group: JournalledGroup
    max_tokens: int
    segments: tuple[Segment, ...]  # at most one of a sample

    @property
    def params(self) -> SamplingParams:
        """The group's, up to the limit and without reports, which change no draw."""
        params = self.group.params
        return replace(
            params,
            seed=self.group.seed,
            max_tokens=self.max_tokens,
            min_tokens=min(params.min_tokens, self.max_tokens),
            logprobs=0,
            prompt_logprobs=None,
        )

    def resume(self) -> list[Completion]:
        """What makes the engine draw these segments and nothing else: prefixes, and the other samples as finished."""
        prefixes = {s.sample.index: s.sample.token_ids[: s.start] for s in self.segments}
        others = [_partial(index, [0], "length") for index in range(self.group.params.n) if index not in prefixes]
        return others + [_partial(index, prefix, "abort") for index, prefix in prefixes.items() if prefix]

    def segment(self, index: int) -> Segment:
        """That of the sample with this index."""
        return next(segment for segment in self.segments if segment.sample.index == index)

    def compare(self, completion: Completion) -> Difference | None:
        """The first difference between a sample and its journalled segment; None where every bit is the same."""
        segment = self.segment(completion.index)
        sample = segment.sample
        position = segment.start + _common_length(segment, completion)
        if position < segment.end or position < len(completion.token_ids):
            journalled, redrawn = _token(sample, position, segment.end), _token(completion, position, None)
        elif segment.ends_by_itself and _end(sample) != _end(completion):
            journalled, redrawn = _end(sample), _end(completion)
        else:
            return None
        return Difference(
            group_id=self.group.group_id,
            index=sample.index,
            policy_version=segment.policy_version,
            position=position,
            journalled=journalled,
            redrawn=redrawn,
        )


def segments_of(sample: JournalledSample) -> Iterator[Segment]:
    """The sample cut where the version changes, in order."""
    start = 0
    for version, run in groupby(sample.policy_versions):
        end = start + len(list(run))
        yield Segment(sample=sample, policy_version=version, start=start, end=end)
        start = end


def redraws_of(
    place: tuple[int, int], group: JournalledGroup, samples: Iterable[JournalledSample], policy_version: int
) -> Iterator[Redraw]:
    """The requests that draw again all that these samples of the group have of one version."""
    by_limit: dict[int, list[Segment]] = {}
    for sample in samples:
        for segment in segments_of(sample):
            if segment.policy_version == policy_version:
                by_limit.setdefault(segment.max_tokens(group.params), []).append(segment)
    for limit, segments in by_limit.items():
        yield Redraw(place=place, group=group, max_tokens=limit, segments=tuple(segments))


def _partial(index: int, token_ids: Sequence[int], finish_reason: str) -> Completion:
    """A completion to resume from. Only its tokens have a say in what is drawn next, so the other columns are blank."""
    blank = [0.0] * len(token_ids)
    return Completion(
        request_id="",
        index=index,
        token_ids=list(token_ids),
        logprobs=blank,
        policy_versions=[0] * len(token_ids),
        finish_reason=finish_reason,
        stop_reason=None,
        text="",
        is_exact=True,
        raw_logprobs=blank,
        kept_mass=blank,
    )


def _common_length(segment: Segment, completion: Completion) -> int:
    """How many tokens from the segment's start on have the same id and the same bits of log-probability."""
    span = slice(segment.start, segment.end)
    pairs = [
        (np.array(source.token_ids[span], dtype=np.int64), _bits(source.logprobs[span]))
        for source in (segment.sample, completion)
    ]
    length = min(len(ids) for ids, _ in pairs)
    (ids, bits), (other_ids, other_bits) = [(ids[:length], bits[:length]) for ids, bits in pairs]
    differing = np.flatnonzero((ids != other_ids) | (bits != other_bits))
    return int(differing[0]) if len(differing) else length


def _token(source: JournalledSample | Completion, position: int, end: int | None) -> DrawnToken | str:
    if position < len(source.token_ids[:end]):
        return DrawnToken(source.token_ids[position], source.logprobs[position])
    return _end(source)


def _end(source: JournalledSample | Completion) -> str:
    reason = "" if source.stop_reason is None else f" ({source.stop_reason!r})"
    return f"ended by {source.finish_reason!r}{reason}"


def _bits(logprobs: Sequence[float]) -> np.ndarray:
    return np.array(logprobs, dtype=np.float32).view(np.uint32)
