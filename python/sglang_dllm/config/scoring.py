"""``dllm.score``: how a request has a given continuation scored."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

from sglang_dllm.config.resolve import SCORE_KEY, dllm_object, parse_options
from sglang_dllm.decoding.caches.base import CacheOptions
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.decoding.scoring.base import ScoringOptions, scored_canvas
from sglang_dllm.decoding.scoring.registry import METHODS, default_method
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import Family, ModelFacts

CONTINUATION = "continuation"


@dataclass(frozen=True)
class Scoring:
    """One continuation, and the method that scores it.

    Attributes:
        continuation: its token ids.
    """

    method: str
    options: ScoringOptions
    continuation: tuple[int, ...]

    @classmethod
    def of(
        cls, given: Mapping[str, Any], continuation: Sequence[int], family: Family
    ) -> Scoring:
        """Read the keys of ``dllm.score``, null ones left out; fill in the others.

        Args:
            given: the continuation's own key is ignored.

        Raises:
            OptionError: an unknown method or key, a wrong type or value.
        """
        keys = {key: value for key, value in given.items() if value is not None}
        keys.pop(CONTINUATION, None)
        method = keys.pop("method", None) or default_method(family)
        scorer = METHODS.get(method) if isinstance(method, str) else None
        if scorer is None:
            raise OptionError("method", method, f"one of {', '.join(METHODS)}")
        known = [key for key in scorer.options.model_fields if key != "max_forwards"]
        for key, value in keys.items():
            if key not in known:
                expected = f"a key of the method {method}: {', '.join(known)}"
                raise OptionError(key, value, expected)
        options = scorer.for_length(
            parse_options(scorer.options, keys), len(continuation)
        )
        return cls(method, options, tuple(continuation))

    @property
    def decoding(self) -> Decoding:
        """The decoding of its canvas."""
        return Decoding(
            METHODS[self.method], self.options, CACHES["none"], CacheOptions()
        )

    def new_canvas(
        self, prompt_ids: Sequence[int], facts: ModelFacts, seed: int
    ) -> Canvas:
        """Its canvas, all masks."""
        scorer = METHODS[self.method]
        return scored_canvas(
            scorer, self.options, prompt_ids, self.continuation, facts, seed
        )

    def to_dict(self) -> dict[str, Any]:
        """The method and its options, as plain values. To read them gives the same."""
        options = self.options.model_dump(exclude={"max_forwards"})
        return {"method": self.method, **options}

    def carried(self) -> dict[str, Any]:
        """The form that a request carries to the scheduler."""
        return {**self.to_dict(), CONTINUATION: list(self.continuation)}


def score_of(custom_params: Any) -> Any:
    """The value of ``dllm.score`` as it is, None without one."""
    return dllm_object(custom_params).get(SCORE_KEY)


def given_scoring(custom_params: Any, family: Family) -> Scoring | None:
    """The continuation of a request, as ``serving`` resolved it.

    Raises:
        OptionError: it is not resolved.
    """
    given = score_of(custom_params)
    if given is None:
        return None
    try:
        continuation = [index(token) for token in given[CONTINUATION]]
    except (TypeError, KeyError):
        raise OptionError(SCORE_KEY, given, "a continuation as token ids") from None
    return Scoring.of(given, continuation, family)
