"""dInfer's hierarchical decoder (arXiv 2510.08666): apart from each other, in parallel.

The best position of every run of masks is decided at once, since positions far from
each other depend on each other least.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import BlockSize, Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import best_of_group, ranks
from sglang_dllm.decoding.statistics import PROBABILITY


class HierarchicalOptions(Options):
    block_size: BlockSize = 64
    threshold: Probability = 0.92
    low_threshold: Probability = 0.62


class Hierarchical(Algorithm):
    """Each run's best above a low threshold, and all above a high one."""

    options = HierarchicalOptions
    caches = CACHES
    statistics = (PROBABILITY,)

    def plan(self, canvases: CanvasBatch) -> Step:
        return block_step(canvases)

    def choose(self, judged: StepInputs) -> Decision:
        found = confidence(judged)
        run = runs(judged.canvas_index, judged.positions)
        best = best_of_group(found.value, run, len(run))
        leads = found.value == best[run]
        rank = ranks(found.value, judged.canvas_index, judged.num_canvases)
        accepted = (
            (rank == 0)
            | (leads & (found.value > judged.option("low_threshold")))
            | (found.value > judged.option("threshold"))
        )
        return Decision(accepted, found.tokens)


def runs(canvas_index: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """``(N,)`` int64 from 0: which run of neighbouring candidates each belongs to."""
    goes_on = (positions.diff() == 1) & (canvas_index.diff() == 0)
    begins = torch.nn.functional.pad(~goes_on, (1, 0), value=True)
    return begins.cumsum(0) - 1
