"""The canvas of a request that gives a part of its answer: text between gaps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import groupby
from operator import index
from typing import Any

CANVAS_KEY = "canvas"
"""The key of a request's ``dllm`` object."""

MASK = -1
"""A mask in a template; all other entries are token ids."""

_MOST_MASKS = 1 << 24
"""More than any context has."""


@dataclass(frozen=True)
class CanvasParts:
    """The tokens behind the prompt before the first forward.

    Attributes:
        template: the token ids of the answer, and of what is given behind it; ``MASK``
            for a mask.
        num_shown: positions of the answer. The model alone reads what is behind them.
    """

    template: tuple[int, ...]
    num_shown: int

    @classmethod
    def of(cls, parts: Iterable[Mapping[str, Any]]) -> CanvasParts:
        """The canvas of ``parts``, the form that a request carries to the scheduler.

        A part is ``{"ids": [...]}`` or ``{"mask": n}``; the last one may have
        ``"shown": False``.

        Raises:
            Exception: of whatever class, where a part has another form.
        """
        template: list[int] = []
        num_shown = 0
        for part in parts:
            ids = part.get("ids")
            template += map(index, ids) if ids else [MASK] * _count(part["mask"])
            if part.get("shown", True):
                num_shown = len(template)
        return cls(tuple(template), num_shown)

    @property
    def parts(self) -> list[dict[str, Any]]:
        """Runs of text and of masks, as plain JSON values."""
        found: list[dict[str, Any]] = []
        for is_mask, run in groupby(self.template[: self.num_shown], MASK.__eq__):
            ids = list(run)
            found.append({"mask": len(ids)} if is_mask else {"ids": ids})
        behind = list(self.template[self.num_shown :])
        return [*found, {"ids": behind, "shown": False}] if behind else found

    @property
    def gaps(self) -> list[tuple[int, int]]:
        """The runs of masks, as half-open ranges of the answer's positions."""
        found, start = [], 0
        for is_mask, run in groupby(self.template, MASK.__eq__):
            end = start + len(list(run))
            if is_mask:
                found.append((start, end))
            start = end
        return found

    def decoded_len(self, block_size: int) -> int:
        """Positions up to the end of the last block with a mask.

        No forward decides what is behind it, so options that depend on the answer's
        length depend on this one.
        """
        _, last = self.gaps[-1]
        return min(-(-last // block_size) * block_size, len(self.template))

    @property
    def num_given(self) -> int:
        return len(self.template) - self.num_masks(len(self.template))

    def num_masks(self, end: int) -> int:
        """Masks among the first ``end`` positions."""
        return self.template[:end].count(MASK)


def _count(num: Any) -> int:
    """A number of masks, of which a list is made."""
    if type(num) is not int or not 0 < num <= _MOST_MASKS:
        raise ValueError(f"{num!r} masks")
    return num
