"""LogitsBatch: the samples of a step whose logits are written out, with what changes the distribution of each."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.request import Request
from engine.truncation import NO_IDS
from kernels.truncated import NUMBERS, DrawOptions, IdLists

MAX_LOGITS_ROWS = 64  # that exist at once: 40 MB at a vocabulary of 152,000


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsBatch:
    """m samples that draw from R rows."""

    rows: torch.Tensor  # [R] int64, ascending rows of the step
    places: list[int]  # [m] of the samples among all of the step
    samples: list[Request]  # [m]
    draws: torch.Tensor  # [5, m] int64: entry of rows, seed, position in the completion, sample index, greedy
    options: DrawOptions

    @classmethod
    def split(
        cls, samples: Sequence[Request], places: np.ndarray, rows: np.ndarray, draws: np.ndarray
    ) -> Iterator[LogitsBatch]:
        """Batches of at most MAX_LOGITS_ROWS rows.

        places [m]: of the samples concerned among all of the step. rows [m]: the row each draws from, ascending.
        draws [5, m], whose first row is written here.
        """
        distinct, entries = np.unique(rows, return_inverse=True)
        for first in range(0, len(distinct), MAX_LOGITS_ROWS):
            part = np.flatnonzero((entries >= first) & (entries < first + MAX_LOGITS_ROWS))
            own = draws.take(part, axis=1)
            own[0] = entries[part] - first
            yield cls._from_samples(
                [samples[place] for place in places[part]],
                rows=torch.from_numpy(distinct[first : first + MAX_LOGITS_ROWS]),
                places=places[part].tolist(),
                draws=torch.from_numpy(own),
            )

    @classmethod
    def _from_samples(
        cls, samples: list[Request], rows: torch.Tensor, places: list[int], draws: torch.Tensor
    ) -> LogitsBatch:
        return cls(
            rows=rows,
            places=places,
            samples=samples,
            draws=draws,
            options=_draw_options(samples, draws[2].tolist()),
        )

    @property
    def num_top(self) -> list[int]:
        return [sample.rules.num_top for sample in self.samples]


def _draw_options(samples: Sequence[Request], positions: Sequence[int]) -> DrawOptions:
    rules = [sample.rules for sample in samples]
    numbers = np.frombuffer(b"".join([one.numbers for one in rules])).reshape(-1, len(NUMBERS))
    tokens = [sample.tokens_before(position) for sample, position in zip(samples, positions, strict=True)]
    seen = [sample.seen_tokens(token_ids) for sample, token_ids in zip(samples, tokens, strict=True)]
    return DrawOptions(
        numbers=torch.from_numpy(numbers.T.copy()),
        seen=_id_lists([ids for ids, _ in seen]),
        counts=torch.from_numpy(np.concatenate([counts for _, counts in seen])),
        biased=_id_lists([one.biased_ids for one in rules]),
        bias=torch.from_numpy(np.concatenate([one.bias for one in rules])),
        masked=_id_lists([sample.masked_ids(ids) for sample, ids in zip(samples, tokens, strict=True)]),
        allowed=_id_lists([one.allowed_ids for one in rules]),
    )


def _id_lists(lists: Sequence[np.ndarray]) -> IdLists:
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return IdLists(
        offsets=torch.from_numpy(offsets), ids=torch.from_numpy(np.concatenate(lists) if offsets[-1] else NO_IDS.copy())
    )
