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
    num_top: list[int]  # [m]
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
        cls, samples: Sequence[Request], rows: torch.Tensor, places: list[int], draws: torch.Tensor
    ) -> LogitsBatch:
        return cls(
            rows=rows,
            places=places,
            num_top=[sample.rules.num_top for sample in samples],
            draws=draws,
            options=_draw_options(samples),
        )


def _draw_options(samples: Sequence[Request]) -> DrawOptions:
    rules = [sample.rules for sample in samples]
    numbers = np.frombuffer(b"".join([one.numbers for one in rules])).reshape(-1, len(NUMBERS))
    seen = [sample.seen_tokens() for sample in samples]
    return DrawOptions(
        numbers=torch.from_numpy(numbers.T.copy()),
        seen=_id_lists([ids for ids, _ in seen]),
        counts=torch.from_numpy(np.concatenate([counts for _, counts in seen])),
        biased=_id_lists([one.biased_ids for one in rules]),
        bias=torch.from_numpy(np.concatenate([one.bias for one in rules])),
        masked=_id_lists([sample.masked_ids() for sample in samples]),
        allowed=_id_lists([one.allowed_ids for one in rules]),
    )


def _id_lists(lists: Sequence[np.ndarray]) -> IdLists:
    offsets = np.zeros(len(lists) + 1, np.int64)
    np.cumsum([len(ids) for ids in lists], out=offsets[1:])
    return IdLists(
        offsets=torch.from_numpy(offsets), ids=torch.from_numpy(np.concatenate(lists) if offsets[-1] else NO_IDS.copy())
    )
