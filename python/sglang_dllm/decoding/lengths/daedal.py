"""``length: daedal`` (DAEDAL, arXiv 2508.00819): grow first, then insert masks.

Source: ``LLaDA_DAEDAL.generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.length_plan import Resize
from sglang_dllm.decoding.lengths.base import LengthRule, Probes
from sglang_dllm.decoding.lengths.eos_confidence import (
    EosLengthOptions,
    EosLengthPlan,
    eos_confidence,
    on_grid,
    per_canvas,
    predictions,
)
from sglang_dllm.decoding.options import Probability
from sglang_dllm.decoding.selection import best_of_group, first_best


class DaedalOptions(EosLengthOptions):
    """
    Attributes:
        start_eos_confidence: the canvas of masks grows below this confidence of EOS.
        insert_eos_confidence: nothing is inserted from this confidence of EOS on.
        insert_confidence: the least confident mask below it gets others beside it.
    """

    start_eos_confidence: Probability = 0.5
    insert_eos_confidence: Probability = 0.9
    insert_confidence: Probability = 0.1


@dataclass
class DaedalPlan(EosLengthPlan):
    """The host's part for one canvas.

    Attributes:
        is_starting: the length of the start is looked for; nothing is committed yet.
    """

    options: DaedalOptions
    is_starting: bool = True

    @property
    def measures_first(self) -> bool:
        return self.is_starting

    def next_resize(self, canvas: Canvas, numbers: Sequence[float]) -> Resize | None:
        confidence, lowest, at = numbers
        if self.is_starting:
            return self._start(len(canvas) - canvas.answer_start, confidence)
        options = self.options
        if (
            canvas.has_ended
            or len(canvas) - canvas.answer_start >= self.cap
            or confidence >= options.insert_eos_confidence
            or not lowest < options.insert_confidence
        ):
            return None
        return Resize(at=int(at), remove=1, insert=options.length_step)

    def _start(self, length: int, confidence: float) -> Resize:
        """Grow, or begin to decode with EOS behind the masks."""
        left = self.cap - length
        if left > 0 and confidence < self.options.start_eos_confidence:
            return Resize(at=length, insert=min(self.options.length_step, left))
        self.is_starting = False
        num_eos = min(self.options.eos_check_tokens // 2, left)
        return Resize(at=length, num_eos=num_eos)


class Daedal(LengthRule[DaedalOptions]):
    """A canvas of masks grows until EOS are predicted at its end.

    Then it is decoded. The least confident mask of a forward is replaced by several
    while few EOS are predicted.
    """

    name = "daedal"
    options = DaedalOptions
    num_measured = 3

    def first_len(self, options: DaedalOptions, cap: int, block_size: int) -> int:
        return min(cap, options.initial_length)

    def plan(self, options: DaedalOptions, cap: int, block_size: int) -> DaedalPlan:
        return DaedalPlan(block_size, cap, options)

    def measure(
        self, inputs: StepInputs[Any, Any], probes: Probes, accepted: torch.Tensor
    ) -> torch.Tensor:
        """``(R, 3)``: the confidence of EOS, the least confidence of a candidate that
        was not accepted, infinity if there is none, and that candidate's position.
        """
        batch, index = inputs.batch, inputs.canvas_index
        ahead = [canvas.prompt_len - canvas.answer_start for canvas in batch.records]
        found = predictions(probes, batch.facts.vocab_size)
        confidence = eos_confidence(batch, probes, found)
        at = inputs.positions + per_canvas(batch, "ahead", ahead)[index]
        sure = on_grid(batch, probes, found.probabilities)[index, at]
        sure = torch.where(accepted | sure.isnan(), torch.inf, sure)
        is_lowest = first_best(-sure, index, len(batch))
        lowest = -best_of_group(-sure, index, len(batch))
        where = at.new_zeros(len(batch)).index_add(
            0, index, torch.where(is_lowest, at, 0)
        )
        return torch.stack([confidence, lowest, where.double()], dim=1)
