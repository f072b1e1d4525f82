"""``length: rho_eos`` (rho-EOS, arXiv 2601.22527): by the density of predicted EOS.

Source: ``LLaDA_rho_EOS.generate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.length_plan import Resize
from sglang_dllm.decoding.lengths.base import LengthRule, Probes
from sglang_dllm.decoding.lengths.eos_confidence import (
    EosLengthOptions,
    EosLengthPlan,
    eos_confidence,
    predictions,
)
from sglang_dllm.decoding.options import Probability

MOST_STEPS = 8
"""The greatest change of the length, in ``length_step``."""

DENSITY_INTERVAL = np.float32(0.1)
"""The farther the density is from the limit, in this unit, the greater the change."""

ADJUSTED_FORWARDS = 64
"""Forwards after which the length stays."""


class RhoEosOptions(EosLengthOptions):
    """
    Attributes:
        low_density, high_density: the answer grows below, and shrinks above.
        step_schedule: how the change grows with the distance to the limit: by 1, 2, 4,
            8 steps, by 1, 2, 3 and so on, or not at all.
    """

    low_density: Probability = 0.4
    high_density: Probability = 0.6
    step_schedule: Annotated[
        Literal["exp", "linear", "const"], Field(description="exp, linear or const")
    ] = "exp"


@dataclass
class RhoEosPlan(EosLengthPlan):
    """The host's part for one canvas. The length is left alone once it is the cap."""

    options: RhoEosOptions

    def may_change(self, canvas: Canvas) -> bool:
        """True if a forward from now on may change the length."""
        length = len(canvas) - canvas.answer_start
        return length < self.cap and canvas.num_forwards <= ADJUSTED_FORWARDS

    def num_kept(self, canvas: Canvas) -> int:
        """Committed tokens may go with the end of the answer."""
        return 0 if self.may_change(canvas) else self.cap

    def next_resize(self, canvas: Canvas, numbers: Sequence[float]) -> Resize | None:
        if canvas.has_ended or not self.may_change(canvas):
            return None
        (density,) = numbers
        length = len(canvas) - canvas.answer_start
        change = self._change(np.float32(density))
        if change > 0:
            return Resize(at=length, insert=min(change, self.cap - length))
        removed = min(-change, length - self.least)
        return Resize(at=length - removed, remove=removed) if removed else None

    def _change(self, density: np.float32) -> int:
        """Positions to come, or to go: below 0. In float32, as the source."""
        low, high = map(
            np.float32, (self.options.low_density, self.options.high_density)
        )
        if density < low:
            return self._steps(low - density) * self.options.length_step
        if density > high:
            return -self._steps(density - high) * self.options.length_step
        return 0

    def _steps(self, gap: np.float32) -> int:
        far = max(1, int(np.ceil((gap + np.float32(1e-12)) / DENSITY_INTERVAL)))
        steps = {"exp": 2 ** (far - 1), "linear": far, "const": 1}
        return min(steps[self.options.step_schedule], MOST_STEPS)


class RhoEos(LengthRule[RhoEosOptions]):
    """The answer grows where few EOS are predicted at its end, and shrinks where many.

    Both happen at the end of the answer, after each forward over the whole canvas.
    """

    name = "rho_eos"
    options = RhoEosOptions
    num_measured = 1

    def first_len(self, options: RhoEosOptions, cap: int, block_size: int) -> int:
        return min(cap, options.initial_length)

    def plan(self, options: RhoEosOptions, cap: int, block_size: int) -> RhoEosPlan:
        return RhoEosPlan(block_size, cap, options)

    def measure(
        self, inputs: StepInputs[Any, Any], probes: Probes, accepted: torch.Tensor
    ) -> torch.Tensor:
        """``(R, 1)``: the density of EOS."""
        batch = inputs.batch
        found = predictions(probes, batch.facts.vocab_size)
        return eos_confidence(batch, probes, found)[:, None]
