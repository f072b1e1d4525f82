"""The news of a canvas after a step."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    """The news of a canvas after a step.

    Attributes:
        num_forwards, num_committed, cut_short, done, num_candidates, window,
            span_end: as in ``Canvas``.
    """

    num_forwards: int
    num_committed: int
    cut_short: bool
    done: bool
    num_candidates: int
    window: tuple[int, int]
    span_end: int
