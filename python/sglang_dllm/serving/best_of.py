"""``best_of``: several answers are decoded, and the best of them come back.

The best have the greatest mean log-probability of their tokens, each at the forward
that committed it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Any

from sglang_dllm.serving.bad_request import refused

BEST_OF = ContextVar("BEST_OF", default=1)
"""The answers that are decoded for each prompt of a completion, if more than n. The
route sets it for the task of one request: SGLang's own request has no place for it."""


def check_best_of(body: Mapping[str, Any]) -> None:
    """Check ``best_of`` of a completion.

    Raises:
        BadRequest: fewer than ``n``, or a stream: the best are known at the end.
    """
    best_of, n = body.get("best_of"), body.get("n", 1)
    if best_of is None:
        return
    if best_of < n:
        raise refused("best_of", best_of, f"n={n} or more")
    if best_of > 1 and body.get("stream"):
        raise refused("best_of", best_of, "1 or nothing with stream=true")


class BestAnswers:
    """Chooses the answers of one request that come back."""

    def __init__(self, obj: Any) -> None:
        """
        Args:
            obj: the GenerateReqInput, before its copies are unfolded.
        """
        params = obj.sampling_params
        n = (params or {}).get("n") if isinstance(params, dict) else None
        self._n = n or 1
        self.num_decoded = max(BEST_OF.get(), self._n)
        if self.is_on:
            obj.return_logprob = True

    @property
    def is_on(self) -> bool:
        """True if more answers are decoded than come back."""
        return self.num_decoded > self._n

    def of(self, out: Any) -> Any:
        """The n best of each prompt, best first; all answers where none is dropped.

        The first one of each prompt counts the tokens of those that are dropped:
        usage has all that were decoded, as OpenAI's has.
        """
        if not self.is_on:
            return out
        found = []
        for first in range(0, len(out), self.num_decoded):
            ranked = sorted(out[first : first + self.num_decoded], key=_mean)[::-1]
            kept, dropped = ranked[: self._n], ranked[self._n :]
            num_dropped = sum(one["meta_info"]["completion_tokens"] for one in dropped)
            kept[0]["meta_info"]["completion_tokens"] += num_dropped
            found += kept
        return found


def _mean(answer: Mapping[str, Any]) -> float:
    """The mean log-probability of an answer; an empty one is the last."""
    values = [value for value, *_ in answer["meta_info"]["output_token_logprobs"]]
    return sum(values) / len(values) if values else -math.inf
