"""PromptOrder: in which order the rows of a data set are trained on, so that a position in it is all its state."""

from __future__ import annotations

import random
from collections.abc import Iterator


class PromptOrder:
    """Passes over a data set, each in a new order that the seed fixes.

    `position` counts the rows handed out so far, over all passes: with the seed and the number of rows it says what
    comes next, so a resumed run seeks to it and goes on.

    Raises ValueError for a data set without rows.
    """

    def __init__(self, num_rows: int, seed: int) -> None:
        if num_rows < 1:
            raise ValueError(f"num_rows={num_rows} must be at least 1: there is nothing to put in order")
        self.num_rows, self.seed = num_rows, seed
        self.position = 0
        self._begin()

    def take(self, num_rows: int = 1) -> list[int]:
        """Indices of the next rows; a batch may reach over the end of a pass, and then hold a row twice."""
        indices = [self.index_at(position) for position in range(self.position, self.position + num_rows)]
        self.position += num_rows
        return indices

    def __iter__(self) -> Iterator[int]:
        """Row after row, without end; `position` moves along."""
        while True:
            yield from self.take()

    def seek(self, position: int) -> None:
        """Go on as if `position` rows had been handed out. Raises ValueError for a negative position."""
        if position < 0:
            raise ValueError(f"position={position} must not be negative: it counts the rows handed out")
        self.position = position

    def index_at(self, position: int) -> int:
        """The index of the row at a position, wherever the order stands."""
        number, place = divmod(position, self.num_rows)
        if number < self._pass_number:  # orders follow from one another, so an earlier one is made from the first on
            self._begin()
        while self._pass_number < number:
            self._next_pass()
        return self._pass[place]

    def _begin(self) -> None:
        self._generator = random.Random(self.seed)
        self._pass_number = -1
        self._next_pass()

    def _next_pass(self) -> None:
        self._pass = self._generator.sample(range(self.num_rows), self.num_rows)
        self._pass_number += 1
