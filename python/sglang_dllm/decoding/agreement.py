"""Tensor-parallel ranks agree on what happened, or the launch ends.

Each rank decodes all canvases, and the ranks decide alike because they compute the same
logits. The model's forward and its head have collectives, in which a rank waits for all
others. If an algorithm raised on one rank alone, that rank would leave out a collective
and the others would wait for ever. So the ranks tell each other where such a thing may
happen, and each of them raises where they differ.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import IntEnum
from typing import TypeAlias


class Event(IntEnum):
    """The next thing that a rank does."""

    DONE = 0
    """It leaves a guarded block without an error."""
    FAILED = 1
    """It leaves a guarded block with an error."""
    HEAD = 2
    """It computes logits, with collectives."""


Agree: TypeAlias = Callable[[Event], None]
"""Tells all ranks an event, and waits for theirs.

Raises ``RanksDiffer`` on every rank if one of them names another event.
"""


class RanksDiffer(RuntimeError):
    """A rank does something else than the others. The launch must end."""


def alone(event: Event) -> None:
    """The ``Agree`` of a single rank."""
