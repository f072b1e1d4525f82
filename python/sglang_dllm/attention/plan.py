"""The forward plan: what one forward computes of each canvas.

Set around a forward by the algorithm, read by the model and by attention; SGLang
rebuilds its ForwardBatch from declared fields on the way, so it cannot carry ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch


@dataclass(frozen=True)
class Window:
    """The window ``[start, end)`` of a canvas of ``canvas_len`` tokens.

    Attributes:
        slots: ``(canvas_len,)`` int64: where the pool keeps the canvas's keys and
            values. None for a canvas that keeps none: its window is all of it.
        padding: how often the window's last token is repeated behind it.
    """

    start: int
    end: int
    canvas_len: int
    slots: torch.Tensor | None = None
    padding: int = 0

    @property
    def length(self) -> int:
        """Tokens of the packed batch, padding among them."""
        return self.end - self.start + self.padding

    @property
    def is_full(self) -> bool:
        """Whether the row attends to nothing but its own fresh keys and values."""
        return self.end - self.start == self.canvas_len


@dataclass(frozen=True)
class AttentionPlan:
    """Which positions of each canvas are recomputed.

    Attributes:
        rows: the windows, back to back in the packed batch of T tokens.
        logits_indices: ``(N,)`` int64 indices into T whose hidden states are wanted. A
            head over whole canvases would cost as much as several blocks, and only
            candidates are looked at.
    """

    rows: Sequence[Window]
    logits_indices: torch.Tensor

    @cached_property
    def lens(self) -> list[int]:
        """Tokens of each row."""
        return [row.length for row in self.rows]

    @cached_property
    def kept(self) -> tuple[torch.Tensor | slice, torch.Tensor] | None:
        """Which of the T tokens keep keys and values, and their slots ``(K,)``."""
        tokens, slots, first = [], [], 0
        for row in self.rows:
            if row.slots is not None:
                tokens.append(torch.arange(first, first + row.length))
                slots.append(row.slots[row.start : row.end])
                if row.padding:
                    slots.append(row.slots[row.end - 1].expand(row.padding))
            first += row.length
        if not slots:
            return None
        at = torch.cat(slots)
        if len(at) == first:
            return slice(None), at
        return torch.cat(tokens).to(at.device), at


_current: AttentionPlan | None = None


@contextmanager
def forward_plan(plan: AttentionPlan) -> Iterator[None]:
    """Make ``plan`` the current one; plans do not nest."""
    global _current
    assert _current is None, "forward plans do not nest"
    _current = plan
    try:
        yield
    finally:
        _current = None


def current_plan() -> AttentionPlan | None:
    """The plan of the forward that runs, or None outside of one of ours."""
    return _current
