"""How one request is decoded: its resolved options, and the canvas made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.caches.base import CacheOptions, CacheStrategy
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.options import Options
from sglang_dllm.models.facts import ModelFacts


@dataclass(frozen=True)
class Decoding:
    """An algorithm and a cache strategy, with the options of one request.

    Attributes:
        unused: keys of ``options`` that mean nothing for the model.
    """

    algorithm: Algorithm[Any, Any]
    options: Options
    cache: CacheStrategy[Any, Any]
    cache_options: CacheOptions
    unused: frozenset[str] = frozenset()

    def finalized(self, answer_len: int, facts: ModelFacts) -> Decoding:
        """With the options that depend on the answer's length and on the tokenizer.

        Raises:
            OptionError: an option does not fit that length.
        """
        options = self.algorithm.finalize(self.options, answer_len, facts)
        return replace(self, options=options)

    def new_canvas(
        self,
        prompt_ids: Sequence[int],
        answer_len: int,
        facts: ModelFacts,
        *,
        template: Sequence[int] | None = None,
        sampling: SamplingOptions | None = None,
        ignore_eos: bool = False,
        ends_at_eos: bool = False,
    ) -> Canvas:
        """A canvas with nothing decoded that these options decode."""
        is_guided = self.algorithm.is_guided(self.options)
        return Canvas.from_template(
            prompt_ids,
            template or [-1] * answer_len,
            mask_id=facts.mask_id,
            eos_ids=facts.eos_ids,
            ignore_eos=ignore_eos,
            ends_at_eos=ends_at_eos,
            sampling=sampling or SamplingOptions(),
            has_cache=self.cache.keeps_kv,
            num_windows=2 if is_guided else 1,
        )

    def to_dict(self) -> dict[str, Any]:
        """The options as plain values, by the keys of a request's ``dllm`` object.

        A response's ``meta_info.dllm`` shows it, and a request carries it to the
        scheduler. To resolve it again gives the same.
        """
        own = self.options.model_dump(exclude=set(self.unused))
        common = {key: own.pop(key) for key in Options.model_fields if key in own}
        return {
            "algorithm": self.algorithm.name,
            "cache": self.cache.name,
            **self.cache_options.model_dump(),
            **common,
            **own,
        }
