"""The block pipeline: which blocks of each canvas exist, are active, are done.

Source: d3LLM ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
With both progress thresholds at 1 this is d3LLM ``generate``: one block at a time.

The state of R canvases of up to K blocks:

- ``left`` ``(R, K)`` int64: mask tokens still in a block, as the reference counts them;
- ``active`` ``(R, K)`` bool: every position may be forced; d3LLM's ``is_complete``;
- ``created`` ``(R,)`` int64: how many blocks exist.
"""

from __future__ import annotations

import torch

from sglang_dllm.decoding.canvases import Canvases, Step, first_true


class Blocks:
    """Where the blocks of some canvases are; at most ``num`` a canvas.

    Blocks have ``block_size`` tokens. The last one is short where the answer's length
    is no multiple; the reference leaves such a tail undecoded.
    """

    def __init__(self, canvases: Canvases, num: int) -> None:
        self.canvases = canvases
        self.size = canvases.option("block_size", torch.int64)
        self.index = torch.arange(num, device=canvases.device)
        self.start = self.index * self.size[:, None]
        end = torch.minimum(
            self.start + self.size[:, None], canvases.answer_len[:, None]
        )
        self.end = end
        self.total = (end - self.start).clamp(min=0)
        self.num = -(-canvases.answer_len // self.size)

    def of(self, positions: torch.Tensor, canvas_index: torch.Tensor) -> torch.Tensor:
        """``(N,)`` int64: the block of each position."""
        return positions // self.size[canvas_index]

    def masks(self) -> torch.Tensor:
        """``(R, K)`` int64: masks of each block."""
        canvases = self.canvases
        block = (canvases.positions // self.size[:, None]).clamp(
            max=len(self.index) - 1
        )
        counts = torch.zeros_like(self.start)
        return counts.scatter_add(1, block, canvases.masked.long())


def blocks_of(canvases: Canvases) -> Blocks:
    """Made once for as long as the same canvases are decoded together."""
    num = canvases.state["left"].shape[1]
    blocks: Blocks = canvases.once("blocks", lambda: Blocks(canvases, num))
    return blocks


def begin(
    canvases: Canvases, activate_progress: torch.Tensor
) -> dict[str, torch.Tensor]:
    """The first block exists. The prompt counts as a finished block before it."""
    (options,) = canvases.options
    blocks = Blocks(canvases, -(-canvases.max_answer_len // options.block_size))
    is_first = blocks.index == 0
    return {
        "left": blocks.total,
        "active": is_first & (activate_progress <= 1.0)[:, None],
        "created": torch.ones_like(canvases.answer_len),
    }


def plan(
    canvases: Canvases, add_progress: torch.Tensor, activate_progress: torch.Tensor
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
    state, blocks = canvases.state, blocks_of(canvases)
    masked = canvases.masked
    stopped = stop_at_eos(canvases, blocks)
    left, active, created = state["left"], state["active"], state["created"]
    exists = blocks.index < created[:, None]
    progress = 1.0 - left.double() / blocks.total
    before = torch.nn.functional.pad(progress[:, :-1], (1, 0), value=1.0)
    active = active | (exists & (before >= activate_progress[:, None]))
    last = (created - 1)[:, None]
    last_progress = progress.gather(1, last)[:, 0]
    creates = (
        ~stopped
        & (created < blocks.num)
        & ((last_progress >= add_progress) | (left.gather(1, last)[:, 0] == 0))
    )
    is_new = creates[:, None] & (blocks.index == created[:, None])
    active = active | (is_new & (last_progress >= activate_progress)[:, None])
    created = created + creates
    exists = exists | is_new
    state["active"], state["created"] = active, created
    live = exists & (active | (left > 0))
    end = torch.where(live, blocks.end, 0).amax(dim=1)
    candidates = masked & (canvases.positions < end[:, None])
    start = first_true(candidates) // blocks.size * blocks.size
    can_be_forced = exists & active & (left > 0)
    forced = first_true(can_be_forced)[:, None].clamp(max=len(blocks.index) - 1)
    is_forced = can_be_forced.any(dim=1)
    return Step(
        candidates,
        start,
        end,
        forced_start=torch.where(is_forced, blocks.start.gather(1, forced)[:, 0], 0),
        forced_end=torch.where(is_forced, blocks.end.gather(1, forced)[:, 0], 0),
    )


def stop_at_eos(canvases: Canvases, blocks: Blocks) -> torch.Tensor:
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
    behind = (
        stopped[:, None]
        & (canvases.positions > eos[:, None])
        & (canvases.positions < canvases.answer_len[:, None])
    )
    canvases.ids = torch.where(behind, canvases.ids.gather(1, at), canvases.ids)
    canvases.masked = canvases.masked & ~behind
    exists = blocks.index < blocks.num[:, None]
    is_new = stopped[:, None] & exists & (blocks.index >= state["created"][:, None])
    touched = stopped[:, None] & exists & (blocks.end > eos[:, None])
    state["created"] = torch.where(stopped, blocks.num, state["created"])
    state["left"] = torch.where(touched, blocks.masks(), state["left"])
    state["active"] = state["active"] | is_new | (touched & (state["left"] == 0))
    return stopped


def committed(
    canvases: Canvases,
    canvas_index: torch.Tensor,
    positions: torch.Tensor,
    accepted: torch.Tensor,
) -> None:
    """Count accepted candidates ``(N,)`` off their blocks."""
    left = canvases.state["left"]
    blocks = blocks_of(canvases)
    cell = canvas_index * left.shape[1] + blocks.of(positions, canvas_index)
    moved = torch.zeros(left.numel(), dtype=left.dtype, device=left.device)
    moved = moved.index_add(0, cell, accepted.long()).view_as(left)
    canvases.state["left"] = torch.where(left > 0, left - moved, left)
