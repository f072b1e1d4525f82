"""The block pipeline: which blocks of each canvas exist, are active, are done.

Source: d3LLM ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
With both progress thresholds at 1 this is d3LLM ``generate``: one block at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows, first_true, scalar_tensor

FAR = 1 << 60
"""Behind every position; a block's size more is an int64 still."""


@dataclass
class PipelineState(TensorRows):
    """R canvases of up to K blocks.

    Attributes:
        block_size: ``(R,)`` int64.
        threshold: ``(R,)`` float64 nats.
        add_progress: ``(R,)`` float64: create the next block when the last one got
            this far, 0 to 1.
        activate_progress: ``(R,)`` float64: activate a block when its predecessor got
            this far.
        stops: ``(R,)`` bool: whether an EOS ends the canvas.
        left: ``(R, K)`` int64: mask tokens still in a block, as the source counts them.
        active: ``(R, K)`` bool: the block exists, and any of its positions may be
            forced; d3LLM's ``is_complete``.
        created: ``(R,)`` int64: how many blocks exist.
        forced_start, forced_end: ``(R,)`` int64: the range in which the next forward
            must accept a candidate. It is empty where nothing is forced.
    """

    block_size: torch.Tensor
    threshold: torch.Tensor
    add_progress: torch.Tensor
    activate_progress: torch.Tensor
    stops: torch.Tensor
    left: torch.Tensor
    active: torch.Tensor
    created: torch.Tensor
    forced_start: torch.Tensor
    forced_end: torch.Tensor


class PipelineOptions(Protocol):
    """The options that the pipeline reads."""

    @property
    def block_size(self) -> int: ...
    @property
    def threshold(self) -> float: ...
    @property
    def early_stop(self) -> bool: ...


Batch: TypeAlias = CanvasBatch[Any, PipelineState]


class Blocks:
    """The places of the blocks of some canvases; at most ``num`` a canvas.

    The last block is short where the answer's length is no multiple of the size. The
    source leaves such a tail undecoded.
    """

    def __init__(
        self, size: torch.Tensor, answer_len: torch.Tensor, positions: torch.Tensor,
        num: int,
    ) -> None:  # fmt: skip
        self.size = size
        self.index = torch.arange(num, device=size.device)
        self.start = self.index * size[:, None]
        self.end = torch.minimum(self.start + size[:, None], answer_len[:, None])
        self.total = (self.end - self.start).clamp(min=0)
        self.num = -(-answer_len // size)
        self.is_real = self.index < self.num[:, None]
        self._of_position = (positions // size[:, None]).clamp(max=num - 1)

    def of(self, positions: torch.Tensor, canvas_index: torch.Tensor) -> torch.Tensor:
        """``(N,)`` int64: the block of each position."""
        return positions // self.size[canvas_index]

    def masks(self, masked: torch.Tensor) -> torch.Tensor:
        """``(R, K)`` int64: masks of each block, of ``(R, A)``."""
        counts = torch.zeros_like(self.start)
        return counts.scatter_add(1, self._of_position, masked.long())


def begin_pipeline(
    batch: CanvasBatch[Any, Any],
    options: PipelineOptions,
    add_progress: float,
    activate_progress: float,
) -> PipelineState:
    """The first block exists. The prompt counts as a finished block before it.

    Given text counts as decoded: a block that is given whole is finished.
    """
    size = batch.one_row(options.block_size)
    num = -(-batch.max_answer_len // options.block_size)
    blocks = Blocks(size, batch.rows.answer_len, batch.positions, num)
    is_first = (blocks.index == 0)[None]
    return PipelineState(
        block_size=size,
        threshold=batch.one_row(float(options.threshold)),
        add_progress=batch.one_row(float(add_progress)),
        activate_progress=batch.one_row(float(activate_progress)),
        stops=batch.one_row(_stops(options, batch.records[0])),
        left=blocks.masks(batch.rows.masked),
        active=is_first if activate_progress <= 1.0 else torch.zeros_like(is_first),
        created=batch.one_row(1),
        forced_start=batch.one_row(FAR),
        forced_end=batch.one_row(0),
    )


def next_pipeline_step(batch: Batch) -> Step:
    """Bring the block states up to date and say what the next forward decides.

    The candidates are taken before an EOS fills what follows it, as in the source: in
    the step that first sees an EOS, positions behind it still compete for LLaDA's
    global minimum, and that decides which tokens before the EOS are committed.
    """
    state, blocks = batch.state, _blocks_of(batch)
    masked = batch.rows.masked
    stopped = _stop_at_eos(batch, blocks)
    left, created = state.left, state.created
    progress = 1.0 - left.double() / blocks.total
    # The last block's; 1 where it is finished, which is enough for any threshold.
    last_progress = progress.gather(1, created[:, None] - 1)[:, 0]
    created = created + (
        ~stopped & (created < blocks.num) & (last_progress >= state.add_progress)
    )
    # Blocks that are given whole are finished already; the next one with masks exists.
    reached = torch.minimum(batch.first_masked() // blocks.size + 1, blocks.num)
    created = torch.maximum(created, reached)
    exists = blocks.index < created[:, None]
    before = torch.nn.functional.pad(progress[:, :-1], (1, 0), value=1.0)
    active = state.active | (exists & (before >= state.activate_progress[:, None]))
    state.active, state.created = active, created
    has_masks = left > 0
    live = active | (exists & has_masks)
    end = torch.where(live, blocks.end, scalar_tensor(0, live.device)).amax(dim=1)
    candidates = masked & (batch.positions < end[:, None])
    start = first_true(candidates) // blocks.size * blocks.size
    can_be_forced = active & has_masks
    # Without such a block, the range begins behind every position and is empty.
    far = scalar_tensor(FAR, live.device)
    forced_start = torch.where(can_be_forced, blocks.start, far).amin(dim=1)
    state.forced_start = forced_start
    state.forced_end = torch.minimum(forced_start + blocks.size, batch.rows.answer_len)
    return Step(candidates, start, end)


def note_committed(
    batch: Batch,
    canvas_index: torch.Tensor,
    positions: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    """Count accepted candidates ``(N,)`` off their blocks."""
    left, blocks = batch.state.left, _blocks_of(batch)
    cell = canvas_index * left.shape[1] + blocks.of(positions, canvas_index)
    moved = torch.zeros(left.numel(), dtype=left.dtype, device=left.device)
    moved = moved.index_add(0, cell, accepted.long()).view_as(left)
    batch.state.left = torch.where(left > 0, left - moved, left)


def _stops(options: PipelineOptions, canvas: Canvas) -> bool:
    """True if an EOS ends the canvas."""
    return options.early_stop and not canvas.ignore_eos


def _blocks_of(batch: Batch) -> Blocks:
    """Made once for as long as the same canvases are decoded together."""
    state = batch.state
    blocks: Blocks = batch.memo(
        "blocks",
        lambda: Blocks(
            state.block_size,
            batch.rows.answer_len,
            batch.positions,
            state.left.shape[1],
        ),
    )
    return blocks


def _stop_at_eos(batch: Batch, blocks: Blocks) -> torch.Tensor:
    """Fill everything behind the first EOS with it and count it as decoded.

    Returns:
        ``(R,)`` bool: the canvases that have an EOS and stop at it.
    """
    state, rows = batch.state, batch.rows
    if not any(
        _stops(*pair) for pair in zip(batch.options, batch.records, strict=True)
    ):
        return torch.zeros_like(rows.done)
    eos = batch.first_eos()
    stopped = state.stops & (eos < rows.answer_len)
    at = eos.clamp(max=batch.max_answer_len - 1)[:, None]
    first = torch.where(stopped, eos, scalar_tensor(FAR, eos.device))[:, None]
    batch.fill(batch.inside & (batch.positions > first), rows.ids.gather(1, at))
    touched = blocks.is_real & (blocks.end > first)
    left = torch.where(touched, blocks.masks(rows.masked), state.left)
    state.created = torch.where(stopped, blocks.num, state.created)
    state.active = state.active | (touched & (left == 0))
    state.left = left
    return stopped
