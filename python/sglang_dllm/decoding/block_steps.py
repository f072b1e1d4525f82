"""Block after block, or the whole canvas at once: the steps that algorithms share."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import scalar_tensor

Batch: TypeAlias = CanvasBatch[Any, Any]


def block_step(batch: Batch, block_size: torch.Tensor) -> Step:
    """The masks of the current block; it is finished before the next one starts.

    The last block is short where the answer's length is no multiple of its size.

    Args:
        block_size: ``(R,)`` int64.
    """
    start = batch.first_masked() // block_size * block_size
    end = torch.minimum(start + block_size, batch.rows.answer_len)
    return Step(masks_before(batch, end), start, end)


def whole_canvas_step(batch: Batch) -> Step:
    """All masks of the answer, from the first step on."""
    start = torch.zeros_like(batch.rows.answer_len)
    return Step(batch.rows.masked, start, batch.rows.answer_len)


def masks_before(batch: Batch, end: torch.Tensor) -> torch.Tensor:
    """``(R, A)`` bool: the masks in front of ``end`` ``(R,)``."""
    return batch.rows.masked & (batch.positions < end[:, None])


def began_masked(batch: Batch, step: Step) -> torch.Tensor:
    """``(R,)`` int64: masks that the span of a step had before the first step."""
    inside = (batch.positions >= step.start[:, None]) & (
        batch.positions < step.end[:, None]
    )
    return (batch.rows.began_masked & inside).sum(dim=1)


def begun_blocks(
    batch: Batch, block_size: torch.Tensor, start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The blocks that had masks before the first step: their number, and how many of
    them begin in front of ``start``. Both ``(R,)`` int64.

    A block that the request gave whole is none of them.

    Args:
        block_size, start: ``(R,)`` int64.
    """

    def make() -> torch.Tensor:
        block = batch.positions // block_size[:, None]
        none = scalar_tensor(-1, block.device)
        of_mask = torch.where(batch.rows.began_masked, block, none)
        before = of_mask[:, :-1].cummax(dim=1).values
        return of_mask > torch.nn.functional.pad(before, (1, 0), value=-1)

    is_first_mask = batch.memo("first masks of blocks", make)
    in_front = is_first_mask & (batch.positions < start[:, None])
    return is_first_mask.sum(dim=1), in_front.sum(dim=1)


def shared_out(
    total: torch.Tensor, parts: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Part ``index`` of ``total`` in ``parts``; the first parts get one more."""
    return total // parts + (index < total % parts)
