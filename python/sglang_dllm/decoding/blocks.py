"""Block states of one canvas: which blocks exist, are active, are done.

Source: d3LLM ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
With both progress thresholds at 1 this is d3LLM ``generate``: one block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from sglang_dllm.decoding.algorithm import Algorithm, DecodingState, Step
from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.families import ModelFacts


@dataclass
class Block:
    """One block ``[start, end)`` of a canvas, absolute indices.

    Attributes:
        left: mask tokens still in it, as the reference counts them.
        active: every position may be forced; d3LLM calls it ``is_complete``.
    """

    start: int
    end: int
    left: int
    active: bool

    @property
    def progress(self) -> float:
        return 1.0 - self.left / (self.end - self.start)


class Blocks(DecodingState):
    """The block pipeline of one canvas.

    Written to the canvas only through ``plan_step`` (the EOS fill) and ``commit``.

    Args:
        options: ``block_size``, tokens a block (the last one is short where the
            answer's length is no multiple; the reference leaves such a tail
            undecoded), and ``early_stop``.
        add_progress: create the next block once the last one got this far, 0 to 1.
        activate_progress: activate a block once its predecessor got this far.
    """

    def __init__(
        self,
        canvas: Canvas,
        algorithm: Algorithm,
        options: Any,
        facts: ModelFacts,
        add_progress: float,
        activate_progress: float,
    ) -> None:
        super().__init__(canvas, algorithm, options, facts)
        self.add_progress = add_progress
        self.activate_progress = activate_progress
        self.blocks: list[Block] = []
        if canvas.answer_len:
            # The prompt counts as a finished block before the first one.
            self._create(active=activate_progress <= 1.0)

    def plan_step(self) -> Step:
        """Bring the block states up to date and say what the next forward decides.

        The candidates are taken before an EOS fills what follows it, as in the
        reference: in the step that first sees an EOS, positions behind it still
        compete for LLaDA's global minimum, and that decides which tokens before the
        EOS are committed.
        """
        canvas = self.canvas
        masked = canvas.masked.copy()
        stops = self.options.early_stop and not canvas.ignore_eos
        eos = canvas.first_eos() if stops else None
        if eos is not None:
            self._stop_at(eos)
        previous_progress = 1.0
        for block in self.blocks:
            if not block.active and previous_progress >= self.activate_progress:
                block.active = True
            previous_progress = block.progress
        last = self.blocks[-1]
        if (
            eos is None
            and last.end < len(canvas)
            and (last.progress >= self.add_progress or last.left == 0)
        ):
            self._create(active=last.progress >= self.activate_progress)
        end = max(b.end for b in self.blocks if b.active or b.left > 0)
        forced = next(
            ((b.start, b.end) for b in self.blocks if b.active and b.left > 0), (0, 0)
        )
        return Step(np.flatnonzero(masked[:end]), forced)

    def commit(self, positions: IdArray, token_ids: IdArray, note: int) -> None:
        """Write accepted tokens to the canvas and count them off their blocks."""
        super().commit(positions, token_ids, note)
        for block in self.blocks:
            if block.left > 0:
                inside = (positions >= block.start) & (positions < block.end)
                block.left -= int(inside.sum())

    def _create(self, active: bool) -> None:
        start = self.blocks[-1].end if self.blocks else self.canvas.prompt_len
        end = min(start + self.options.block_size, len(self.canvas))
        self.blocks.append(Block(start, end, end - start, active))

    def _stop_at(self, eos: int) -> None:
        """Everything behind the first EOS becomes EOS and counts as decoded."""
        self.canvas.fill_after(eos)
        while self.blocks[-1].end < len(self.canvas):
            self._create(active=True)
        for block in self.blocks:
            if block.end > eos:
                block.left = int(self.canvas.masked[block.start : block.end].sum())
                block.active = block.active or block.left == 0
