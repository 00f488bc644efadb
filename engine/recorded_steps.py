"""RecordedSteps: decode steps that are run again without Python, one recording for each number of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

from kernels.recording import Arena, Recording, record


class RecordedSteps:
    """A step of B rows, one of each request, makes the same kernel calls whatever the requests: inputs, KV blocks and
    weights change in place. So the second step of B rows is recorded while it runs, and later ones repeat it."""

    def __init__(self, arena: Arena) -> None:
        """arena: may be shared by those whose steps never run at the same time."""
        self._recordings: dict[int, Recording | None] = {}  # by number of rows; None where one step has been seen
        self._arena = arena

    def recording(self, num_rows: int) -> Recording | None:
        """The recorded step of so many rows, if there is one."""
        return self._recordings.get(num_rows)

    def run(self, num_rows: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `forward` gives: computed by it, or by a recording of it (and then overwritten next time)."""
        if num_rows not in self._recordings:
            self._recordings[num_rows] = None
            return forward()
        recording = self._recordings[num_rows]
        if recording is not None:
            return recording.run()
        self._recordings[num_rows] = recording = record(forward, self._arena)
        return recording.output
