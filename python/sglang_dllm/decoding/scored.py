"""The continuation that a canvas scores, and the numbers of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sglang_dllm.decoding.history import FloatArray, IdArray


@dataclass
class Scored:
    """
    Attributes:
        target: ``(A,)`` int64: the continuation.
        is_sum: as in ``scoring.base.Scorer``.
        scores: ``(A,)`` float64: the number of each token so far.
    """

    target: IdArray
    is_sum: bool = True
    scores: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        self.scores = np.zeros(len(self.target))

    def note(self, scores: FloatArray) -> None:
        """Take over the numbers of a forward."""
        self.scores = scores.copy()

    def to_dict(self) -> dict[str, Any]:
        """The answer, once the canvas is done.

        ``log_likelihood`` in nats with ``token_log_likelihoods``, or ``is_greedy``. A
        number that is not finite is None, as JSON has no word for it.
        """
        if not self.is_sum:
            return {"is_greedy": bool((self.scores == 1).all())}
        numbers = [*self.scores.tolist(), math.fsum(self.scores)]
        *tokens, total = [one if math.isfinite(one) else None for one in numbers]
        return {"log_likelihood": total, "token_log_likelihoods": tokens}
