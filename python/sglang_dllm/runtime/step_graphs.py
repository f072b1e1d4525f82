"""CUDA graphs of whole steps: the forward, its decision, and the next step.

A step is one replay and one transfer: the host hears what was committed and which
windows come next, and replays again. The tensors of the canvases live in a
``StaticGroup``, so windows may move from step to step without the host. It is the
server's default decoding that is captured. Batches that it does not hold run their
forwards in graphs or eagerly, and decide behind them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Head, Logits
from sglang_dllm.decoding.static_group import StaticGroup, StepShape, StepTokens
from sglang_dllm.runtime.graph_capture import Capture, Run


class StepForward(Protocol):
    """The model over R windows of L tokens, as a capture needs it."""

    def place(self, canvases: Sequence[Canvas]) -> None:
        """Before a replay: these canvases are computed; others fill up to R."""
        ...

    def hidden(self, tokens: StepTokens) -> torch.Tensor:
        """In a capture: the hidden states ``(N, H)`` of ``tokens.logits_indices``."""
        ...


@dataclass(frozen=True)
class StepGraph:
    """One captured step."""

    shape: StepShape
    forward: StepForward
    replay: Run

    def holds(self, canvases: Sequence[Canvas]) -> bool:
        """True if the step that the host was told of fits."""
        windows = [canvas.window for canvas in canvases]
        return (
            len(windows) <= self.shape.num_canvases
            and max(end - start for start, end in windows) <= self.shape.length
            and sum(c.num_candidates for c in canvases) <= self.shape.num_candidates
        )


class StepGraphs:
    """The captured steps of one static group."""

    def __init__(
        self,
        static: StaticGroup,
        head: Head,
        vocab_size: int,
        capture: Capture,
    ) -> None:
        """
        Args:
            head: from hidden states to logits.
            vocab_size: V of the logits.
        """
        self.static = static
        self._head, self._vocab_size = head, vocab_size
        self._capture = capture
        self._graphs: list[StepGraph] = []

    @property
    def shapes(self) -> list[StepShape]:
        """The captured shapes, in the order in which they are tried."""
        return [graph.shape for graph in self._graphs]

    def capture(self, shape: StepShape, forward: StepForward) -> None:
        """Capture a step. No request may be active: the capture runs over fillers.

        Args:
            forward: of the shape's windows.

        Raises:
            RuntimeError: the capture failed; there may be no memory left.
        """
        forward.place([])
        replay = self._capture(partial(self._run, shape, forward))
        graph = StepGraph(shape, forward, replay)
        # The smallest graph that holds a step is the fastest.
        self._graphs = sorted([*self._graphs, graph], key=lambda one: one.shape)

    def launch(self, group: Group) -> bool:
        """Replay the next step of a group; False if no capture holds it.

        Does not wait for the device. The group's table tells what was committed.
        """
        if not self._graphs or not self.static.accepts(group):
            return False
        records = group.records
        graph = next((one for one in self._graphs if one.holds(records)), None)
        if graph is None:
            return False
        self.static.load(group)
        graph.forward.place(records)
        graph.replay()
        self.static.report(group)
        return True

    def _run(self, shape: StepShape, forward: StepForward) -> tuple[torch.Tensor, ...]:
        def logits(tokens: StepTokens) -> Logits:
            return Logits.of_hidden(
                forward.hidden(tokens), self._head, self._vocab_size
            )

        self.static.step(shape, logits)
        # The outputs are in the fixed tensors.
        return ()
