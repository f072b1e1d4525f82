"""``length: append`` (iLLaDA, arXiv 2606.25331): blocks of masks until an EOS comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.length_plan import LengthPlan, Resize
from sglang_dllm.decoding.lengths.base import LengthOptions, LengthRule


class AppendOptions(LengthOptions):
    """
    Attributes:
        append_blocks: how many blocks come at a time.
    """

    append_blocks: Annotated[
        int, Field(ge=1, le=4096, description="an integer, 1 to 4096")
    ] = 1


@dataclass
class AppendPlan(LengthPlan):
    """The next masks, as soon as all are committed and none of them is an EOS.

    Attributes:
        unit: how many masks come at a time.
    """

    unit: int

    def next_resize(self, canvas: Canvas, numbers: Sequence[float]) -> Resize | None:
        length = len(canvas) - canvas.answer_start
        if canvas.masked.any() or length >= self.cap or canvas.has_ended:
            return None
        return Resize(at=length, insert=min(self.unit, self.cap - length))


class Append(LengthRule[AppendOptions]):
    """The answer grows by whole blocks up to the cap.

    Each time, the algorithm begins anew with everything before as its prompt.
    """

    name = "append"
    options = AppendOptions
    by_units = True

    def first_len(self, options: AppendOptions, cap: int, block_size: int) -> int:
        return min(cap, options.append_blocks * block_size)

    def plan(self, options: AppendOptions, cap: int, block_size: int) -> AppendPlan:
        return AppendPlan(block_size, cap, unit=options.append_blocks * block_size)
