"""LocalLeap (arXiv 2510.07081): a lower threshold around sure positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import BlockSize, Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows


class LocalLeapOptions(Options):
    block_size: BlockSize = 32
    anchor_threshold: Probability = 0.9
    neighbor_threshold: Probability = 0.75
    radius: Annotated[
        int, Field(ge=0, le=4096, description="an integer, 0 to 4096")
    ] = 4


@dataclass
class LocalLeapState(TensorRows):
    """``block_size``, ``radius`` ``(R,)`` int64, the thresholds ``(R,)`` float64."""

    block_size: torch.Tensor
    radius: torch.Tensor
    anchor_threshold: torch.Tensor
    neighbor_threshold: torch.Tensor


Batch: TypeAlias = CanvasBatch[LocalLeapOptions, LocalLeapState]
Inputs: TypeAlias = StepInputs[LocalLeapOptions, LocalLeapState]


class LocalLeap(Algorithm[LocalLeapOptions, LocalLeapState]):
    """The paper's pool of thresholds, block-wise."""

    options = LocalLeapOptions
    state = LocalLeapState
    caches = ALL_CACHES
    statistics = (PROBABILITY,)

    def captured_options(self, options: LocalLeapOptions) -> LocalLeapOptions:
        return LocalLeapOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[LocalLeapOptions, Any], options: LocalLeapOptions
    ) -> LocalLeapState:
        return LocalLeapState(
            block_size=batch.one_row(options.block_size),
            radius=batch.one_row(options.radius),
            anchor_threshold=batch.one_row(options.anchor_threshold),
            neighbor_threshold=batch.one_row(options.neighbor_threshold),
        )

    def next_step(self, batch: Batch) -> Step:
        return block_step(batch, batch.state.block_size)

    def decide(self, inputs: Inputs) -> Decision:
        found, state = confidence(inputs), inputs.state
        strict = inputs.per_candidate(state.anchor_threshold)
        near = near_any(
            found.value >= strict,
            inputs.canvas_index,
            inputs.positions,
            inputs.per_candidate(state.radius),
        )
        loose = inputs.per_candidate(state.neighbor_threshold)
        threshold = torch.where(near, loose, strict)
        rank = ranks(found.value, inputs.canvas_index, inputs.num_canvases)
        return Decision((rank == 0) | (found.value >= threshold), found.tokens)


def near_any(
    anchors: torch.Tensor,
    canvas_index: torch.Tensor,
    positions: torch.Tensor,
    radius: torch.Tensor,
) -> torch.Tensor:
    """The candidates at most ``radius`` positions from an anchor of their canvas.

    Args:
        anchors: ``(N,)`` bool.
        canvas_index, positions: ``(N,)`` int64, ascending.
        radius: ``(N,)`` int64.

    Returns:
        ``(N,)`` bool; an anchor is near itself.
    """
    # One line of places for all canvases, so far apart that none reaches another.
    apart = 1 << 32
    place = canvas_index * apart + positions
    before = torch.where(anchors, place, -apart).cummax(0).values
    after = torch.where(anchors, place, 1 << 62).flip(0).cummin(0).values.flip(0)
    return (place - before <= radius) | (after - place <= radius)
