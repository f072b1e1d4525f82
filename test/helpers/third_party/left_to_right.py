"""Algorithms from outside: tokens from left to right, and one that breaks."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks


class LeftToRightOptions(Options):
    width: Annotated[int, Field(ge=1, le=64, description="an integer, 1 to 64")] = 1


class LeftToRight(Algorithm):
    """The first ``width`` masks."""

    options = LeftToRightOptions

    def plan(self, canvases: CanvasBatch) -> Step:
        return whole_canvas_step(canvases)

    def choose(self, judged: StepInputs) -> Decision:
        accepted = _places(judged) < judged.option("width", torch.int64)
        return Decision(accepted, confidence(judged).tokens)


class FaultyOptions(Options):
    where: Annotated[str, Field(description="a method's name")] = "choose"


class Faulty(Algorithm):
    """Raises where it is told to, or returns what has the wrong shape."""

    options = FaultyOptions

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        _fail_in("begin", canvases)
        return {}

    def plan(self, canvases: CanvasBatch) -> Step:
        _fail_in("plan", canvases)
        if bool(canvases.num_forwards.any()):
            _fail_in("later_plan", canvases)
        return whole_canvas_step(canvases)

    def choose(self, judged: StepInputs) -> Decision:
        _fail_in("choose", judged.canvases)
        accepted = _places(judged) < 1
        tokens = confidence(judged).tokens
        if judged.canvases.options[0].where == "shape":
            return Decision(accepted[1:], tokens)
        return Decision(accepted, tokens)

    def committed(
        self, judged: StepInputs, accepted: torch.Tensor, choice: Decision
    ) -> None:
        _fail_in("committed", judged.canvases)


def _places(judged: StepInputs) -> torch.Tensor:
    """0 for the first mask of its canvas, then 1."""
    return ranks(-judged.positions.double(), judged.canvas_index, judged.num_canvases)


def _fail_in(where: str, canvases: CanvasBatch) -> None:
    if any(options.where == where for options in canvases.options):
        raise RuntimeError(f"told to fail in {where}")
