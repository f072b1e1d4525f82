"""Adaptive parallel decoding in the form its servers use: the k best above a threshold.

The paper's (arXiv 2506.00413) checks drafts with an autoregressive model; without one,
what is left is this rule.
"""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY


class AdaptiveParallelOptions(Options):
    max_parallel: Annotated[
        int, Field(ge=1, le=4096, description="an integer, 1 to 4096")
    ] = 8
    threshold: Probability = 0.3


class AdaptiveParallel(Algorithm):
    """Up to ``max_parallel`` tokens a step, anywhere in the canvas."""

    options = AdaptiveParallelOptions
    statistics = (PROBABILITY,)

    def plan(self, canvases: CanvasBatch) -> Step:
        return whole_canvas_step(canvases)

    def choose(self, judged: StepInputs) -> Decision:
        found = confidence(judged)
        rank = ranks(found.value, judged.canvas_index, judged.num_canvases)
        among_best = rank < judged.option("max_parallel", torch.int64)
        sure = found.value > judged.option("threshold")
        return Decision((rank == 0) | (among_best & sure), found.tokens)
