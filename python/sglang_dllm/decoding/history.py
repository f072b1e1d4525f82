"""The history of a watched canvas: what each forward committed, and how sure it was."""

from __future__ import annotations

from dataclasses import astuple, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

FORMAT, VERSION = "sglang-dllm-trace", 1
"""The first two fields of a trace, which is a history as JSON."""

IdArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Resized:
    """A change of the answer's length.

    Attributes:
        at: answer position of the change.
        removed, inserted: masks that were taken out there, and put in.
    """

    at: int
    removed: int
    inserted: int


@dataclass
class PastStep:
    """One forward and the commit behind it, or a change of length behind a forward.

    Answer positions count from 0, in the canvas as it was during the forward.

    Attributes:
        forward: its number, from 1.
        positions, tokens: what it committed.
        logprobs: natural logarithm of the probability of each token. NaN where a rule
            filled the position, as behind an EOS.
        taken_back: positions that are masks again.
        resized: how the canvas changed its length. Such a step commits nothing, and
            has the number of the forward before it.
    """

    forward: int
    positions: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    taken_back: list[int] = field(default_factory=list)
    resized: Resized | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for another process."""
        found = zip(self.positions, self.tokens, self.logprobs, strict=True)
        return {
            "forward": self.forward,
            "committed": list(found),
            "taken_back": self.taken_back,
            "resized": self.resized and list(astuple(self.resized)),
        }


class History:
    """The steps of one canvas, as its host record learns of them.

    Attributes:
        steps: in order.
        num_taken: the steps that ``take_news`` gave out.
    """

    def __init__(self) -> None:
        self.steps: list[PastStep] = []
        self.num_taken = 0

    @property
    def has_news(self) -> bool:
        """True if a step is there that nobody took yet."""
        return len(self.steps) > self.num_taken

    def note(
        self,
        forward: int,
        before: IdArray,
        answer: IdArray,
        logprobs: FloatArray | None,
        first: int = 0,
    ) -> None:
        """Note a step. A call without another forward and without a change adds none.

        Args:
            forward: forwards that were run so far.
            before, answer: ``(A,)`` before the step and after it; negative where a
                position is masked. A token that changed counts as committed again.
            logprobs: ``(A,)``; NaN where no forward decided. None: nowhere.
            first: answer position of the first entry of the arrays.
        """
        (found,) = np.nonzero((answer >= 0) & (answer != before))
        (lost,) = np.nonzero((answer < 0) & (before >= 0))
        last = self.steps[-1].forward if self.steps else 0
        if forward == last and not len(found) and not len(lost):
            return
        measured = np.full(len(answer), np.nan) if logprobs is None else logprobs
        self.steps.append(
            PastStep(
                forward,
                (found + first).tolist(),
                answer[found].tolist(),
                measured[found].tolist(),
                (lost + first).tolist(),
            )
        )

    def note_resize(self, at: int, removed: int, inserted: int) -> None:
        """Note a change of the answer's length, as a step of its own.

        The steps before it may have been taken already.
        """
        forward = self.steps[-1].forward if self.steps else 0
        self.steps.append(PastStep(forward, resized=Resized(at, removed, inserted)))

    def take_news(self) -> tuple[int, list[dict[str, Any]]]:
        """The steps since the last call, and the index of the first of them."""
        first, self.num_taken = self.num_taken, len(self.steps)
        return first, [step.to_dict() for step in self.steps[first:]]


def ranges(flags: BoolArray) -> list[list[int]]:
    """The half-open ranges of positions that are true, in order."""
    edges = np.flatnonzero(np.diff(flags.astype(np.int8), prepend=0, append=0))
    return edges.reshape(-1, 2).tolist()
