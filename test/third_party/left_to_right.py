"""Algorithms from outside: tokens from left to right, and one that breaks."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import (
    Algorithm,
    Choice,
    DecodingState,
    Judged,
    Step,
)
from sglang_dllm.decoding.blockwise import WholeCanvasState
from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.families import ModelFacts


class LeftToRightOptions(Options):
    width: Annotated[int, Field(ge=1, le=64, description="an integer, 1 to 64")] = 1


class LeftToRight(Algorithm):
    """The first ``width`` masks."""

    options = LeftToRightOptions

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        return WholeCanvasState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        place = ranks(
            -judged.positions.double(), judged.canvas_index, judged.num_canvases
        )
        accepted = place < judged.option("width", torch.int64)
        return Choice(accepted, confidence(judged).tokens)


class FaultyOptions(Options):
    where: Annotated[str, Field(description="a method's name")] = "choose"


class FaultyState(WholeCanvasState):
    def plan_step(self) -> Step:
        _fail_in("plan_step", self.options)
        return super().plan_step()

    def commit(self, positions: IdArray, token_ids: IdArray, note: int) -> None:
        _fail_in("commit", self.options)
        super().commit(positions, token_ids, note)


class Faulty(Algorithm):
    """Raises where it is told to, or returns what has the wrong shape."""

    options = FaultyOptions

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        _fail_in("start", options)
        return FaultyState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        for state in judged.states:
            _fail_in("choose", state.options)
        accepted = torch.ones_like(judged.positions, dtype=torch.bool)
        tokens = confidence(judged).tokens
        if judged.states[0].options.where == "shape":
            return Choice(accepted[1:], tokens)
        return Choice(accepted, tokens)


def _fail_in(where: str, options: Any) -> None:
    if options.where == where:
        raise RuntimeError(f"told to fail in {where}")
