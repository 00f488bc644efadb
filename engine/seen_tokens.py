"""SeenTokens: which tokens a sample has seen and how often it has drawn each, kept up as the sample grows."""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import numpy as np


class SeenTokens:
    """Distinct ids of prompt and output, in order of appearance, with their number of appearances in the output."""

    def __init__(self, num_prompt_tokens: int) -> None:
        self._num_prompt_tokens = num_prompt_tokens
        self._places: dict[int, int] = {}
        self._ids, self._counts = array("i"), array("i")
        self._num_read = 0

    def read(self, token_ids: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """(ids, counts), both int32, of prompt and output; `token_ids` is what was read last, and more."""
        for position in range(self._num_read, len(token_ids)):
            self._count(token_ids[position], is_output=position >= self._num_prompt_tokens)
        self._num_read = len(token_ids)
        return np.array(self._ids, dtype=np.int32), np.array(self._counts, dtype=np.int32)

    def _count(self, token_id: int, is_output: bool) -> None:
        place = self._places.setdefault(token_id, len(self._ids))
        if place == len(self._ids):
            self._ids.append(token_id)
            self._counts.append(0)
        self._counts[place] += is_output
