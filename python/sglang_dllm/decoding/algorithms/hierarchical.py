"""dInfer's hierarchical decoder (arXiv 2510.08666): apart from each other, in parallel.

The best position of every run of masks is decided at once, since positions far from
each other depend on each other least.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import BlockSize, Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import best_of_group, ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows


class HierarchicalOptions(Options):
    block_size: BlockSize = 64
    threshold: Probability = 0.92
    low_threshold: Probability = 0.62


@dataclass
class HierarchicalState(TensorRows):
    """``block_size`` ``(R,)`` int64, the thresholds ``(R,)`` float64."""

    block_size: torch.Tensor
    threshold: torch.Tensor
    low_threshold: torch.Tensor


Batch: TypeAlias = CanvasBatch[HierarchicalOptions, HierarchicalState]
Inputs: TypeAlias = StepInputs[HierarchicalOptions, HierarchicalState]


class Hierarchical(Algorithm[HierarchicalOptions, HierarchicalState]):
    """Each run's best above a low threshold, and all above a high one."""

    options = HierarchicalOptions
    state = HierarchicalState
    caches = ALL_CACHES
    statistics = (PROBABILITY,)

    def captured_options(self, options: HierarchicalOptions) -> HierarchicalOptions:
        return HierarchicalOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[HierarchicalOptions, Any], options: HierarchicalOptions
    ) -> HierarchicalState:
        return HierarchicalState(
            block_size=batch.one_row(options.block_size),
            threshold=batch.one_row(options.threshold),
            low_threshold=batch.one_row(options.low_threshold),
        )

    def next_step(self, batch: Batch) -> Step:
        return block_step(batch, batch.state.block_size)

    def decide(self, inputs: Inputs) -> Decision:
        found, state = confidence(inputs), inputs.state
        run = runs(inputs.canvas_index, inputs.positions)
        best = best_of_group(found.value, run, len(run))
        leads = found.value == best[run]
        rank = ranks(found.value, inputs.canvas_index, inputs.num_canvases)
        accepted = (
            (rank == 0)
            | (leads & (found.value > inputs.per_candidate(state.low_threshold)))
            | (found.value > inputs.per_candidate(state.threshold))
        )
        return Decision(accepted, found.tokens)


def runs(canvas_index: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``(N,)`` int64 from 0: the run of neighbouring candidates of each candidate."""
    goes_on = (positions.diff() == 1) & (canvas_index.diff() == 0)
    begins = torch.nn.functional.pad(~goes_on, (1, 0), value=True)
    return begins.cumsum(0) - 1
