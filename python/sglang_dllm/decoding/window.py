"""The window of one canvas that one forward computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

DUMMY_SLOT = 0
"""SGLang's pools keep this KV slot for the writes of padding. No canvas owns it."""


@dataclass(frozen=True)
class Window:
    """The positions ``[start, end)`` of a canvas of ``canvas_len`` tokens.

    Attributes:
        start, end: in the canvas, prompt included.
        kv_slots: ``(canvas_len,)`` int64: the pool's slots of the canvas's keys and
            values. None for a canvas that keeps none: its window is all of it.
        padding: how often the window's last token is repeated behind it, to fill a
            CUDA graph's bucket.
    """

    start: int
    end: int
    canvas_len: int
    kv_slots: torch.Tensor | None = None
    padding: int = 0

    @property
    def num_tokens(self) -> int:
        """Tokens of the packed batch, padding included."""
        return self.end - self.start + self.padding

    @property
    def is_full(self) -> bool:
        """True if the window is the whole canvas, which needs no keys of the pool."""
        return self.end - self.start == self.canvas_len
