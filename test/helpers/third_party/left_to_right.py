"""Algorithms from outside: tokens from left to right, and one that breaks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, NoState
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows


class LeftToRightOptions(Options):
    width: Annotated[int, Field(ge=1, le=64, description="an integer, 1 to 64")] = 1


@dataclass
class LeftToRightState(TensorRows):
    """``width`` ``(R,)`` int64."""

    width: torch.Tensor


class LeftToRight(Algorithm[LeftToRightOptions, LeftToRightState]):
    """The first ``width`` masks."""

    options = LeftToRightOptions
    state = LeftToRightState

    def begin(
        self, batch: CanvasBatch[LeftToRightOptions, Any], options: LeftToRightOptions
    ) -> LeftToRightState:
        return LeftToRightState(width=batch.one_row(options.width))

    def next_step(
        self, batch: CanvasBatch[LeftToRightOptions, LeftToRightState]
    ) -> Step:
        return whole_canvas_step(batch)

    def decide(
        self, inputs: StepInputs[LeftToRightOptions, LeftToRightState]
    ) -> Decision:
        accepted = _places(inputs) < inputs.per_candidate(inputs.state.width)
        return Decision(accepted, confidence(inputs).tokens)


class FaultyOptions(Options):
    where: Annotated[str, Field(description="a method's name")] = "decide"


FaultyBatch: TypeAlias = CanvasBatch[FaultyOptions, NoState]
FaultyInputs: TypeAlias = StepInputs[FaultyOptions, NoState]


class Faulty(Algorithm[FaultyOptions, NoState]):
    """Raises where it is told to, or returns what has the wrong shape."""

    options = FaultyOptions

    def begin(
        self, batch: CanvasBatch[FaultyOptions, Any], options: FaultyOptions
    ) -> NoState:
        _fail_in("begin", batch)
        return NoState()

    def next_step(self, batch: FaultyBatch) -> Step:
        _fail_in("next_step", batch)
        if bool(batch.rows.num_forwards.any()):
            _fail_in("later_step", batch)
        return whole_canvas_step(batch)

    def decide(self, inputs: FaultyInputs) -> Decision:
        _fail_in("decide", inputs.batch)
        accepted = _places(inputs) < 1
        tokens = confidence(inputs).tokens
        if inputs.options[0].where == "shape":
            return Decision(accepted[1:], tokens)
        return Decision(accepted, tokens)

    def on_commit(
        self, inputs: FaultyInputs, accepted: torch.Tensor, decision: Decision
    ) -> None:
        _fail_in("on_commit", inputs.batch)


def _places(inputs: StepInputs[Any, Any]) -> torch.Tensor:
    """0 for the first mask of its canvas, then 1."""
    return ranks(-inputs.positions.double(), inputs.canvas_index, inputs.num_canvases)


def _fail_in(where: str, batch: FaultyBatch) -> None:
    if any(options.where == where for options in batch.options):
        raise RuntimeError(f"told to fail in {where}")
