"""How sure a forward is that the answer ends before its canvas does.

The common part of ``rho_eos`` and ``daedal``, whose published code has the same
function for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.length_plan import LengthPlan
from sglang_dllm.decoding.lengths.base import LengthOptions, Probes
from sglang_dllm.decoding.statistics import DRAW_ELEMENTS, row_chunks

Batch: TypeAlias = CanvasBatch[Any, Any]

PositionCount = Annotated[
    int, Field(ge=1, le=4096, description="an integer, 1 to 4096")
]


class EosLengthOptions(LengthOptions):
    """
    Attributes:
        initial_length: answer positions in the first forward.
        length_step: positions by which the answer changes, or a multiple of it.
        eos_check_tokens: predicted EOS that are full confidence.
    """

    initial_length: PositionCount = 64
    length_step: PositionCount = 8
    eos_check_tokens: PositionCount = 32


@dataclass
class EosLengthPlan(LengthPlan):
    """The host's part for one canvas."""

    options: EosLengthOptions


class Predictions(NamedTuple):
    """The best token of each probed position, the mask token included.

    ``tokens``: (P,) int64. ``probabilities``: (P,) float64, NaN where the logits have
    one.
    """

    tokens: torch.Tensor
    probabilities: torch.Tensor


def predictions(probes: Probes, vocab_size: int) -> Predictions:
    """Read the logits as they are: no temperature, no guidance."""
    tokens = torch.zeros_like(probes.positions)
    found = torch.zeros_like(tokens, dtype=torch.float64)
    for part in row_chunks(len(tokens), vocab_size, DRAW_ELEMENTS):
        logits = probes.logits(part).double()
        best, tokens[part] = logits.max(dim=-1)
        found[part] = (best - logits.logsumexp(dim=-1)).exp()
    return Predictions(tokens, found)


def on_grid(batch: Batch, probes: Probes, values: torch.Tensor) -> torch.Tensor:
    """``(R, W)`` from ``(P,)``: by canvas and position, 0 behind a shorter answer."""
    width = max(len(canvas) - canvas.answer_start for canvas in batch.records)
    grid = values.new_zeros((len(batch), width))
    return grid.index_put((probes.canvas_index, probes.positions), values)


def per_canvas(batch: Batch, name: str, values: Sequence[int]) -> torch.Tensor:
    """``(R,)`` int64 on the device; uploaded once for as long as canvases stay."""

    def make() -> torch.Tensor:
        return torch.tensor(values).to(batch.device, non_blocking=True)

    found: torch.Tensor = batch.memo(name, make)
    return found


def eos_confidence(batch: Batch, probes: Probes, found: Predictions) -> torch.Tensor:
    """``(R,)`` float64: the predicted EOS from the canvas's end on.

    The probabilities of the last positions whose best token is an EOS are summed, of
    ``eos_check_tokens`` positions at most. The sum is divided by that number also where
    fewer are.
    """
    nums = [_plan_of(canvas).options.eos_check_tokens for canvas in batch.records]
    num = per_canvas(batch, "eos_check_tokens", nums)
    is_eos = torch.zeros_like(found.tokens, dtype=torch.bool)
    for eos in batch.facts.eos_ids:
        is_eos |= found.tokens == eos
    is_eos &= ~found.probabilities.isnan()
    counted = on_grid(batch, probes, is_eos.long())
    up_to_here = counted.flip(1).cumsum(dim=1).flip(1)
    values = torch.where(is_eos, found.probabilities, 0.0)
    near_end = up_to_here <= num[:, None]
    return (on_grid(batch, probes, values) * near_end).sum(dim=1) / num


def _plan_of(canvas: Canvas) -> EosLengthPlan:
    assert isinstance(canvas.length, EosLengthPlan)
    return canvas.length
