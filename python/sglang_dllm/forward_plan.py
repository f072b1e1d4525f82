"""The forward plan: what one forward computes of each canvas.

Set around a forward by the algorithm, read by the model and by attention; SGLang
rebuilds its ForwardBatch from declared fields on the way, so it cannot carry ours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ForwardPlan:
    """A full prefill: every position of every canvas is recomputed.

    Attributes:
        lens: tokens of each canvas, back to back in the packed batch of T tokens.
        logits_rows: ``(N,)`` int64 indices into T whose logits are wanted. A head
            over whole canvases would cost as much as several blocks, and only
            candidates are looked at.
    """

    lens: Sequence[int]
    logits_rows: torch.Tensor


_current: ForwardPlan | None = None


@contextmanager
def forward_plan(plan: ForwardPlan) -> Iterator[None]:
    """Make ``plan`` the current one; plans do not nest."""
    global _current
    assert _current is None, "forward plans do not nest"
    _current = plan
    try:
        yield
    finally:
        _current = None


def current_plan() -> ForwardPlan | None:
    """The plan of the forward that runs, or None outside of one of ours."""
    return _current
