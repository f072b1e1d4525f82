"""How one canvas changes its length: what a rule decides after each forward."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sglang_dllm.decoding.canvas import Canvas


@dataclass(frozen=True)
class Resize:
    """A change of the answer's length between two forwards.

    Attributes:
        at: the first position that changes, from the answer's start.
        remove: how many positions go, from there on.
        insert: how many masks come in their place.
        num_eos: how many EOS come behind these masks, at the end of the answer.
    """

    at: int
    remove: int = 0
    insert: int = 0
    num_eos: int = 0


@dataclass
class LengthPlan(ABC):
    """How long one canvas gets; ``lengths`` has the rules.

    Attributes:
        block_size: tokens of a block.
        cap: the longest answer. A change that pushes positions behind it loses them.
        least: the shortest answer (``min_tokens``).
    """

    block_size: int
    cap: int
    least: int = field(default=0, kw_only=True)

    @property
    def measures_first(self) -> bool:
        """True if the next forward of a canvas that begins anew commits nothing."""
        return False

    def num_kept(self, canvas: Canvas) -> int:
        """Answer positions that no change takes away once they are committed."""
        return self.cap

    @abstractmethod
    def next_resize(self, canvas: Canvas, numbers: Sequence[float]) -> Resize | None:
        """The change of length before the next forward, None for none.

        Args:
            canvas: as of the last forward.
            numbers: what the rule measured in that forward.
        """
