"""An algorithm from outside: so many tokens a step, from left to right."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Choice, DecodingState, Judged
from sglang_dllm.decoding.blockwise import WholeCanvasState
from sglang_dllm.decoding.canvas import Canvas
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
