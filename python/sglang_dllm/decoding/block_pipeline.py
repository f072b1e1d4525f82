"""The block pipeline: which blocks of each canvas exist, are active, are done.

Source: d3LLM ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
With both progress thresholds at 1 this is d3LLM ``generate``: one block at a time.

The state of R canvases of up to K blocks:

- ``left`` ``(R, K)`` int64: mask tokens still in a block, as the reference counts them;
- ``active`` ``(R, K)`` bool: exists, and every position may be forced; d3LLM's
  ``is_complete``;
- ``created`` ``(R,)`` int64: how many blocks exist.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step, first_true, number

FAR = 1 << 60
"""Behind every position; a block's size more is an int64 still."""


class Blocks:
    """Where the blocks of some canvases are; at most ``num`` a canvas.

    Blocks have ``block_size`` tokens. The last one is short where the answer's length
    is no multiple; the reference leaves such a tail undecoded.
    """

    def __init__(self, canvases: CanvasBatch, num: int) -> None:
        self.size = canvases.option("block_size", torch.int64)
        self.index = torch.arange(num, device=canvases.device)
        self.start = self.index * self.size[:, None]
        end = torch.minimum(
            self.start + self.size[:, None], canvases.answer_len[:, None]
        )
        self.end = end
        self.total = (end - self.start).clamp(min=0)
        self.num = -(-canvases.answer_len // self.size)
        self.is_real = self.index < self.num[:, None]
        block = canvases.positions // self.size[:, None]
        self._of_position = block.clamp(max=num - 1)

    def of(self, positions: torch.Tensor, canvas_index: torch.Tensor) -> torch.Tensor:
        """``(N,)`` int64: the block of each position."""
        return positions // self.size[canvas_index]

    def masks(self, masked: torch.Tensor) -> torch.Tensor:
        """``(R, K)`` int64: masks of each block, of ``(R, A)``."""
        counts = torch.zeros_like(self.start)
        return counts.scatter_add(1, self._of_position, masked.long())


def blocks_of(canvases: CanvasBatch, num: int) -> Blocks:
    """Made once for as long as the same canvases are decoded together."""
    blocks: Blocks = canvases.once("blocks", lambda: Blocks(canvases, num))
    return blocks


def begin(
    canvases: CanvasBatch, activate_progress: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The first block exists. The prompt counts as a finished block before it."""
    (options,) = canvases.options
    blocks = blocks_of(canvases, -(-canvases.max_answer_len // options.block_size))
    is_first = blocks.index == 0
    return {
        "left": blocks.total,
        "active": is_first & (activate_progress <= 1.0)[:, None],
        "created": torch.ones_like(canvases.answer_len),
    }


def plan(
    canvases: CanvasBatch, add_progress: torch.Tensor, activate_progress: torch.Tensor
) -> Step:
    """Bring the block states up to date and say what the next forward decides.

    The candidates are taken before an EOS fills what follows it, as in the reference:
    in the step that first sees an EOS, positions behind it still compete for LLaDA's
    global minimum, and that decides which tokens before the EOS are committed.

    Args:
        add_progress: ``(R,)`` float64: create the next block once the last one got
            this far, 0 to 1.
        activate_progress: ``(R,)`` float64: activate a block once its predecessor
            got this far.
    """
    state = canvases.state
    blocks = blocks_of(canvases, state["left"].shape[1])
    masked = canvases.masked
    stopped = stop_at_eos(canvases, blocks)
    left, created = state["left"], state["created"]
    progress = 1.0 - left.double() / blocks.total
    # Of the last block; 1 where it is finished, which is enough for any threshold.
    last_progress = progress.gather(1, created[:, None] - 1)[:, 0]
    created = created + (
        ~stopped & (created < blocks.num) & (last_progress >= add_progress)
    )
    exists = blocks.index < created[:, None]
    before = torch.nn.functional.pad(progress[:, :-1], (1, 0), value=1.0)
    active = state["active"] | (exists & (before >= activate_progress[:, None]))
    state["active"], state["created"] = active, created
    has_masks = left > 0
    live = active | (exists & has_masks)
    end = torch.where(live, blocks.end, number(0, live.device)).amax(dim=1)
    candidates = masked & (canvases.positions < end[:, None])
    start = first_true(candidates) // blocks.size * blocks.size
    can_be_forced = active & has_masks
    # Where there is none, a range that begins behind every position and is empty.
    far = number(FAR, live.device)
    forced_start = torch.where(can_be_forced, blocks.start, far).amin(dim=1)
    forced_end = torch.minimum(forced_start + blocks.size, canvases.answer_len)
    return Step(
        candidates, start, end, forced_start=forced_start, forced_end=forced_end
    )


def stop_at_eos(canvases: CanvasBatch, blocks: Blocks) -> torch.Tensor:
    """Everything behind the first EOS becomes EOS and counts as decoded.

    Returns:
        ``(R,)`` bool: the canvases that have one and stop at it.
    """
    state = canvases.state
    stops = [
        options.early_stop and not canvas.ignore_eos
        for options, canvas in zip(canvases.options, canvases.records, strict=True)
    ]
    if not any(stops):
        return torch.zeros_like(canvases.done)
    eos = canvases.first_eos()
    stopped = canvases.constant("stops", lambda: stops, torch.bool)
    stopped = stopped & (eos < canvases.answer_len)
    at = eos.clamp(max=canvases.max_answer_len - 1)[:, None]
    first = torch.where(stopped, eos, number(FAR, eos.device))[:, None]
    behind = canvases.inside & (canvases.positions > first)
    canvases.ids = torch.where(behind, canvases.ids.gather(1, at), canvases.ids)
    canvases.masked = canvases.masked & ~behind
    touched = blocks.is_real & (blocks.end > first)
    left = torch.where(touched, blocks.masks(canvases.masked), state["left"])
    state["created"] = torch.where(stopped, blocks.num, state["created"])
    state["active"] = state["active"] | (touched & (left == 0))
    state["left"] = left
    return stopped


def committed(
    canvases: CanvasBatch,
    canvas_index: torch.Tensor,
    positions: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    """Count accepted candidates ``(N,)`` off their blocks."""
    left = canvases.state["left"]
    blocks = blocks_of(canvases, left.shape[1])
    cell = canvas_index * left.shape[1] + blocks.of(positions, canvas_index)
    moved = torch.zeros(left.numel(), dtype=left.dtype, device=left.device)
    moved = moved.index_add(0, cell, accepted.long()).view_as(left)
    canvases.state["left"] = torch.where(left > 0, left - moved, left)
