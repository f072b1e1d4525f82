"""How sure the forwards were that committed the tokens of a canvas."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from sglang_dllm.decoding.history import FloatArray, IdArray

UNLIKELIEST = -9999.0
"""Stands for minus infinity, which JSON does not have. OpenAI's value."""

MAX_TOP_LOGPROBS = 20
"""The most alternatives of a token, as SGLang and vLLM have it, and OpenAI's chat.
OpenAI's completions allow 5."""


@dataclass(frozen=True)
class Revealed:
    """M tokens that a step committed in one canvas, each with its K best alternatives.

    Log-probabilities are natural logarithms, in the model's own distribution without
    the mask token.

    Attributes:
        positions: ``(M,)``, from the start of the part that is decoded.
        logprobs: ``(M,)``: of the committed tokens.
        top_ids, top_logprobs: ``(M, K)``: the best tokens of each position, best first.
    """

    positions: IdArray
    logprobs: FloatArray
    top_ids: IdArray
    top_logprobs: FloatArray

    @classmethod
    def of_canvas(cls, index: int, table: IdArray) -> Revealed:
        """The rows of one canvas of a group in ``reveal_table.RevealTable.rows``."""
        num_top = (table.shape[1] - 3) // 2
        rows = table[table[:, 0] == index]
        bits = np.ascontiguousarray(rows[:, 2:3])
        top_bits = np.ascontiguousarray(rows[:, 3 + num_top :])
        return cls(
            rows[:, 1],
            bits.view(np.float64)[:, 0],
            rows[:, 3 : 3 + num_top],
            top_bits.view(np.float64),
        )

    def spread(self, length: int) -> FloatArray:
        """``(length,)``: the log-probability at each position, NaN where none is."""
        found = np.full(length, np.nan)
        found[self.positions] = self.logprobs
        return found


class Reveals:
    """The log-probabilities of one canvas's answer, as its host record learns of them.

    A position that no forward decided has none: text that the request gave, and what a
    rule filled. A token that was taken back has none until the position is committed
    again.

    Attributes:
        num_top: the best alternatives that are kept of each token.
    """

    def __init__(self, answer_len: int, num_top: int) -> None:
        self.num_top = num_top
        self._logprobs = np.full(answer_len, np.nan)
        self._top_ids = np.zeros((answer_len, num_top), dtype=np.int64)
        self._top_logprobs = np.zeros((answer_len, num_top))

    def note(
        self, before: IdArray, answer: IdArray, found: Revealed | None, first: int = 0
    ) -> None:
        """Note a step.

        Args:
            before, answer: ``(A,)`` before the step and after it; negative where a
                position is masked.
            found: what the step committed. None: nothing by a forward.
            first: answer position of the first entry of the arrays.
        """
        (changed,) = np.nonzero(answer != before)
        self._logprobs[changed + first] = np.nan
        if found is None:
            return
        at = found.positions + first
        self._logprobs[at] = found.logprobs
        self._top_ids[at] = found.top_ids[:, : self.num_top]
        self._top_logprobs[at] = found.top_logprobs[:, : self.num_top]

    def replace(self, at: int, remove: int, insert: int) -> None:
        """Put positions without a log-probability in the place of others."""
        for name in ("_logprobs", "_top_ids", "_top_logprobs"):
            old = getattr(self, name)
            fill = np.nan if name == "_logprobs" else 0
            new = np.full((insert, *old.shape[1:]), fill, dtype=old.dtype)
            setattr(self, name, np.concatenate([old[:at], new, old[at + remove :]]))

    def of(self, position: int, token: int) -> tuple[float, list[int], list[float]]:
        """The log-probability of a committed token, and its alternatives, best first.

        A token that no forward decided was certain: 0, and it is the only one of its
        alternatives.
        """
        logprob = float(self._logprobs[position])
        if np.isnan(logprob):
            only = min(1, self.num_top)
            return 0.0, [token] * only, [0.0] * only
        best = self._top_logprobs[position]
        return (
            max(logprob, UNLIKELIEST),
            self._top_ids[position].tolist(),
            np.maximum(best, UNLIKELIEST).tolist(),
        )
