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

from sglang_dllm.decoding.window import Window


@dataclass(frozen=True)
class AttentionPlan:
    """Which positions of each canvas are recomputed.

    Attributes:
        windows: back to back in the packed batch of T tokens.
        logits_indices: ``(N,)`` int64 indices into T whose hidden states are wanted. A
            head over whole canvases would cost as much as several blocks, and only
            candidates are looked at.
    """

    windows: Sequence[Window]
    logits_indices: torch.Tensor

    @cached_property
    def lens(self) -> list[int]:
        """Tokens of each row."""
        return [row.num_tokens for row in self.windows]

    @cached_property
    def kept(self) -> tuple[torch.Tensor | slice, torch.Tensor] | None:
        """Which of the T tokens keep keys and values, and their slots ``(K,)``."""
        tokens, slots, first = [], [], 0
        for row in self.windows:
            if row.kv_slots is not None:
                tokens.append(torch.arange(first, first + row.num_tokens))
                slots.append(row.kv_slots[row.start : row.end])
                if row.padding:
                    slots.append(row.kv_slots[row.end - 1].expand(row.padding))
            first += row.num_tokens
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
