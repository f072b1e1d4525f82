"""The interface of a length rule: it changes a canvas's length between forwards.

A rule has a part on the device, which measures each forward, and a part on the host,
which decides. The host knows the canvas after each forward anyway. So a change of
length costs no wait of its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar, Generic, TypeVar

import torch

from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.length_plan import LengthPlan
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.options import StrictModel


class LengthOptions(StrictModel):
    """The options of a rule; some have none."""


@dataclass(frozen=True)
class Probes:
    """The P answer positions of those of R canvases that a forward computed whole.

    Nobody reads what is measured of the other canvases.

    Attributes:
        canvas_index: ``(P,)`` int64, ascending.
        positions: ``(P,)`` int64: from ``Canvas.answer_start``.
        logits: of these positions, committed ones too.
    """

    canvas_index: torch.Tensor
    positions: torch.Tensor
    logits: Logits


LengthOptionsT = TypeVar("LengthOptionsT", bound=LengthOptions)


class LengthRule(ABC, Generic[LengthOptionsT]):
    """One published way to find the length. One object serves all requests.

    Attributes:
        name: the value of the option ``length``.
        options: the keys that only this rule reads.
        keeps_length: the canvas has the length that was asked for, and keeps it.
        by_units: each change appends masks behind a full canvas. Other rules may
            change the canvas anywhere, so that ``steps`` cannot be shared out.
        num_measured: how many numbers ``measure`` gives for each canvas.
    """

    name: ClassVar[str]
    options: ClassVar[type[LengthOptions]] = LengthOptions
    keeps_length: ClassVar[bool] = False
    by_units: ClassVar[bool] = False
    num_measured: ClassVar[int] = 0

    @abstractmethod
    def first_len(self, options: LengthOptionsT, cap: int, block_size: int) -> int:
        """The answer's length in the first forward.

        Args:
            cap: the longest answer.
            block_size: of the algorithm.
        """

    @abstractmethod
    def plan(
        self, options: LengthOptionsT, cap: int, block_size: int
    ) -> LengthPlan | None:
        """The part on the host for one canvas; None where it keeps its length."""

    def measure(
        self, inputs: StepInputs, probes: Probes, accepted: torch.Tensor
    ) -> torch.Tensor:
        """Measure a forward: ``(R, num_measured)`` float64.

        Args:
            inputs: the candidates of the step, before the commit.
            accepted: ``(N,)`` bool: the candidates that are committed.
        """
        raise NotImplementedError(f"{self.name} measures nothing")
