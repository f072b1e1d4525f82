"""Capture of a forward in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

Run = Callable[[], tuple[torch.Tensor, ...]]
"""A forward over fixed tensors, or the replay of one."""

Capture = Callable[[Run], Run]
"""From a forward to its replay; both return the same tensors."""


class CudaCapture:
    """A ``Capture``. All its graphs share their memory: the output of one graph must be
    read before another one runs."""

    def __init__(self) -> None:
        self._memory_pool: Any = None

    def forget(self) -> None:
        """All graphs are gone. The next ones get memory of their own: a pool without
        a graph cannot be captured into."""
        self._memory_pool = None

    def __call__(self, run: Run) -> Run:
        # Kernels are compiled and chosen at their first runs, which a capture forbids.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                run()
        torch.cuda.current_stream().wait_stream(stream)
        self._memory_pool = self._memory_pool or torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory_pool):
            out = run()

        def replay() -> tuple[torch.Tensor, ...]:
            graph.replay()
            return out

        return replay
