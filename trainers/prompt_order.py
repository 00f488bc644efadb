"""PromptOrder: which rows a run draws samples for - passes over the data set, each in an order that the seed fixes."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]


class PromptOrder:
    """An endless sequence of rows; its place in it is all the state it has."""

    def __init__(self, rows: Sequence[Row], seed: int) -> None:
        """rows: at least one. seed: of the run."""
        self._rows = list(rows)
        self._generator = random.Random(seed)
        self._places: list[int] = []  # of the passes drawn so far: indices of rows
        self.position = 0  # rows taken so far

    def take(self, num_rows: int) -> list[Row]:
        """The next rows."""
        rows = [self.row(position) for position in range(self.position, self.position + num_rows)]
        self.position += num_rows
        return rows

    def row(self, position: int) -> Row:
        """The row at any place of the sequence, taken or not."""
        while len(self._places) <= position:
            self._places += self._generator.sample(range(len(self._rows)), len(self._rows))
        return self._rows[self._places[position]]

    def seek(self, position: int) -> None:
        """Goes on from a place, as when so many rows had been taken."""
        if position < 0:
            raise ValueError(f"position={position} must not be negative")
        self.position = position
