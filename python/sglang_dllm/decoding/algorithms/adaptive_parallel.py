"""Adaptive parallel decoding in the form its servers use: the k best above a threshold.

The paper's (arXiv 2506.00413) checks drafts with an autoregressive model. Without one,
this rule is left.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows


class AdaptiveParallelOptions(Options):
    max_parallel: Annotated[
        int, Field(ge=1, le=4096, description="an integer, 1 to 4096")
    ] = 8
    threshold: Probability = 0.3


@dataclass
class AdaptiveParallelState(TensorRows):
    """``max_parallel`` ``(R,)`` int64, ``threshold`` ``(R,)`` float64."""

    max_parallel: torch.Tensor
    threshold: torch.Tensor


Batch: TypeAlias = CanvasBatch[AdaptiveParallelOptions, AdaptiveParallelState]
Inputs: TypeAlias = StepInputs[AdaptiveParallelOptions, AdaptiveParallelState]


class AdaptiveParallel(Algorithm[AdaptiveParallelOptions, AdaptiveParallelState]):
    """Up to ``max_parallel`` tokens a step, anywhere in the canvas."""

    options = AdaptiveParallelOptions
    state = AdaptiveParallelState
    statistics = (PROBABILITY,)

    def captured_options(
        self, options: AdaptiveParallelOptions
    ) -> AdaptiveParallelOptions:
        return AdaptiveParallelOptions(max_forwards=1)

    def begin(
        self,
        batch: CanvasBatch[AdaptiveParallelOptions, Any],
        options: AdaptiveParallelOptions,
    ) -> AdaptiveParallelState:
        return AdaptiveParallelState(
            max_parallel=batch.one_row(options.max_parallel),
            threshold=batch.one_row(options.threshold),
        )

    def next_step(self, batch: Batch) -> Step:
        return whole_canvas_step(batch)

    def decide(self, inputs: Inputs) -> Decision:
        found = confidence(inputs)
        rank = ranks(found.value, inputs.canvas_index, inputs.num_canvases)
        among_best = rank < inputs.per_candidate(inputs.state.max_parallel)
        sure = found.value > inputs.per_candidate(inputs.state.threshold)
        return Decision((rank == 0) | (among_best & sure), found.tokens)
