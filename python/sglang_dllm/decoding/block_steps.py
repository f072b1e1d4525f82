"""Block after block, or the whole canvas at once: the plans that algorithms share."""

from __future__ import annotations

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step

Span = tuple[torch.Tensor, torch.Tensor]


def current_block(canvases: CanvasBatch) -> Span:
    """Start and end ``(R,)`` of the block that holds the first mask.

    Blocks have ``block_size`` tokens; the last one is short where the answer's length
    is no multiple of it.
    """
    size = canvases.option("block_size", torch.int64)
    start = canvases.first_masked() // size * size
    return start, torch.minimum(start + size, canvases.answer_len)


def block_step(canvases: CanvasBatch) -> Step:
    """The masks of the current block; it is finished before the next one starts."""
    start, end = current_block(canvases)
    return Step(masks_before(canvases, end), start, end)


def whole_canvas_step(canvases: CanvasBatch) -> Step:
    """All masks of the answer, from the first step on."""
    start = torch.zeros_like(canvases.answer_len)
    return Step(canvases.masked, start, canvases.answer_len)


def masks_before(canvases: CanvasBatch, end: torch.Tensor) -> torch.Tensor:
    """``(R, A)`` bool."""
    return canvases.masked & (canvases.positions < end[:, None])


def shared_out(
    total: torch.Tensor, parts: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Part ``index`` of ``total`` in ``parts``, the first ones getting one more."""
    return total // parts + (index < total % parts)
