"""CapturedSteps: decode steps as CUDA graphs, one for each padded number of rows."""

from __future__ import annotations

from collections.abc import Callable

import torch

MAX_GRAPH_ROWS = 512
_EXACT = (1, 2, 4, 8)


def padded_num_rows(num_rows: int) -> int:
    """Rows of the graph that serves a decode step of `num_rows`, filled up with rows that store nothing.

    From MAX_GRAPH_ROWS on there are no graphs and nothing is filled up.
    """
    if num_rows > MAX_GRAPH_ROWS:
        return num_rows
    exact = next((size for size in _EXACT if num_rows <= size), None)
    if exact is not None:
        return exact
    stride = 8 if num_rows <= 64 else 16 if num_rows <= 256 else 32
    return -(-num_rows // stride) * stride


class CapturedSteps:
    """A step of P rows, one of each request, launches the same kernels whatever the requests: inputs, KV blocks and
    weights change in place. The first step of P rows compiles what it needs; the second is captured, then repeated.
    """

    def __init__(self) -> None:
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, torch.Tensor] | None] = {}  # None: one step has been seen
        self._pool: tuple[int, int] | None = None  # memory that all graphs share, since they run one at a time

    def run(self, num_rows: int, forward: Callable[[], torch.Tensor]) -> torch.Tensor:
        """What `forward` gives: computed by it, or by a graph of it (and then overwritten by the next step)."""
        if num_rows > MAX_GRAPH_ROWS:
            return forward()
        if num_rows not in self._graphs:
            self._graphs[num_rows] = None
            return forward()
        if self._graphs[num_rows] is None:
            self._graphs[num_rows] = self._capture(forward)
        return self.replay(num_rows)

    def replay(self, num_rows: int) -> torch.Tensor:
        """Runs a captured step again on what the input tensors hold."""
        graph, output = self._graphs[num_rows]
        graph.replay()
        return output

    def _capture(self, forward: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
        graph = torch.cuda.CUDAGraph()
        # another thread may be packing the next step meanwhile, which touches nothing that is captured
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            output = forward()
        self._pool = graph.pool()
        return graph, output
