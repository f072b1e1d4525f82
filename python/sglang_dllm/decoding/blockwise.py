"""Block after block: the state of algorithms that finish one before the next."""

from __future__ import annotations

from typing import Any

import numpy as np

from sglang_dllm.decoding.algorithm import Algorithm, DecodingState, Step
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.families import ModelFacts


class BlockwiseState(DecodingState):
    """The current block ``[start, end)`` of a canvas; its masks are the candidates.

    The last block is short where the answer's length is no multiple of the block's.
    """

    def __init__(
        self, canvas: Canvas, algorithm: Algorithm, options: Any, facts: ModelFacts
    ) -> None:
        super().__init__(canvas, algorithm, options, facts)
        self.start = self.end = canvas.prompt_len
        self.block_index = -1

    def plan_step(self) -> Step:
        if not self.canvas.masked[self.start : self.end].any():
            self.begin_block()
        return self.plan_in_block()

    def begin_block(self) -> None:
        """Go on to the next block."""
        self.start = self.end
        self.end = min(self.start + self.options.block_size, len(self.canvas))
        self.block_index += 1

    def plan_in_block(self) -> Step:
        """What the next forward decides in the current block."""
        masks = self.canvas.masked[self.start : self.end]
        return Step(self.start + np.flatnonzero(masks))


class WholeCanvasState(DecodingState):
    """All masks of the answer are candidates from the first step on."""

    def plan_step(self) -> Step:
        return Step(np.flatnonzero(self.canvas.masked))


def shared_out(total: int, parts: int, index: int) -> int:
    """Part ``index`` of ``total`` in ``parts``, the first ones getting one more."""
    return total // parts + (index < total % parts)
