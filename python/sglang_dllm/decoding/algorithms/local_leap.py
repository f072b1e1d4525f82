"""LocalLeap (arXiv 2510.07081): a lower threshold around sure positions."""

from __future__ import annotations

from typing import Annotated

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import BlockSize, Options, Probability
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY


class LocalLeapOptions(Options):
    block_size: BlockSize = 32
    anchor_threshold: Probability = 0.9
    neighbor_threshold: Probability = 0.75
    radius: Annotated[
        int, Field(ge=0, le=4096, description="an integer, 0 to 4096")
    ] = 4


class LocalLeap(Algorithm):
    """The paper's pool of thresholds, block-wise."""

    options = LocalLeapOptions
    caches = CACHES
    statistics = (PROBABILITY,)

    def plan(self, canvases: CanvasBatch) -> Step:
        return block_step(canvases)

    def choose(self, judged: StepInputs) -> Decision:
        found = confidence(judged)
        strict = judged.option("anchor_threshold")
        near = near_any(
            found.value >= strict,
            judged.canvas_index,
            judged.positions,
            judged.option("radius", torch.int64),
        )
        threshold = torch.where(near, judged.option("neighbor_threshold"), strict)
        rank = ranks(found.value, judged.canvas_index, judged.num_canvases)
        return Decision((rank == 0) | (found.value >= threshold), found.tokens)


def near_any(
    anchors: torch.Tensor,
    canvas_index: torch.Tensor,
    positions: torch.Tensor,
    radius: torch.Tensor,
) -> torch.Tensor:
    """Which candidates are at most ``radius`` positions from an anchor of their canvas.

    Args:
        anchors: ``(N,)`` bool.
        canvas_index, positions: ``(N,)`` int64, ascending.
        radius: ``(N,)`` int64.

    Returns:
        ``(N,)`` bool; an anchor is near itself.
    """
    # One line of places for all canvases, far enough apart that none reaches another.
    apart = 1 << 32
    place = canvas_index * apart + positions
    before = torch.where(anchors, place, -apart).cummax(0).values
    after = torch.where(anchors, place, 1 << 62).flip(0).cummin(0).values.flip(0)
    return (place - before <= radius) | (after - place <= radius)
