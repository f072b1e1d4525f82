"""How one request is decoded: its resolved options, and the canvas made from them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.caches.base import CacheOptions, CacheStrategy
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.lengths.base import LengthOptions, LengthRule
from sglang_dllm.decoding.lengths.fixed import FIXED
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.token_edits import TokenEdits
from sglang_dllm.models.facts import ModelFacts


@dataclass(frozen=True)
class Decoding:
    """An algorithm, a cache and a length rule, with the options of one request.

    Attributes:
        unused: keys of ``options`` that mean nothing for the model.
    """

    algorithm: Algorithm[Any, Any]
    options: Options
    cache: CacheStrategy[Any, Any]
    cache_options: CacheOptions
    length: LengthRule[Any] = FIXED
    length_options: LengthOptions = field(default_factory=LengthOptions)
    unused: frozenset[str] = frozenset()

    @property
    def block_size(self) -> int:
        """Tokens of a block; 1 of an algorithm that has none."""
        return getattr(self.options, "block_size", 1)

    def first_len(self, cap: int) -> int:
        """The answer's length in the first forward, for at most ``cap`` tokens."""
        return self.length.first_len(self.length_options, cap, self.block_size)

    def finalized(self, answer_len: int, facts: ModelFacts) -> Decoding:
        """With the options that depend on the answer's length and on the tokenizer.

        Args:
            answer_len: of the part of the canvas that is decoded.

        Raises:
            OptionError: an option does not fit that length.
        """
        options = self.algorithm.finalize(self.options, answer_len, facts)
        return replace(self, options=options)

    def resolved(self, cap: int, facts: ModelFacts) -> Decoding:
        """The form that a request carries to the scheduler, ``finalized`` for now.

        A canvas that is resized is finalized again for its next length, so that options
        of the length stay as they were asked for.

        Raises:
            OptionError: an option does not fit that length.
        """
        found = self.finalized(self.first_len(cap), facts)
        if self.length.keeps_length:
            return found
        by_length = self.algorithm.by_length
        asked = {key: getattr(self.options, key) for key in by_length}
        return replace(found, options=found.options.model_copy(update=asked))

    def new_canvas(
        self,
        prompt_ids: Sequence[int],
        cap: int,
        facts: ModelFacts,
        *,
        template: Sequence[int] | None = None,
        num_shown: int | None = None,
        sampling: SamplingOptions | None = None,
        ignore_eos: bool = False,
        ends_at_eos: bool = False,
        edits: TokenEdits | None = None,
    ) -> Canvas:
        """A canvas with nothing decoded that these options decode.

        Args:
            cap: the longest answer, in tokens.
            template: the answer's ids, -1 for a mask; None for masks only.
            num_shown: answer positions that may be handed out; None for all.
            edits: what the request changes of the logits.
        """
        least = 0 if edits is None else min(edits.min_tokens, cap)
        # Blocks that are appended need no start of that length: no EOS ends them.
        first_len = (
            self.first_len(cap)
            if self.length.by_units
            else max(self.first_len(cap), least)
        )
        is_guided = self.algorithm.is_guided(self.options)
        plan = self.length.plan(self.length_options, cap, self.block_size)
        canvas = Canvas.from_template(
            prompt_ids,
            template or [-1] * first_len,
            mask_id=facts.mask_id,
            eos_ids=facts.eos_ids,
            ignore_eos=ignore_eos,
            ends_at_eos=ends_at_eos,
            sampling=sampling or SamplingOptions(),
            has_cache=self.cache.keeps_kv,
            num_windows=2 if is_guided else 1,
            length=plan and replace(plan, least=least),
            edits=edits,
            max_forwards=self.options.max_forwards,
            num_shown=num_shown,
            algorithm=self.algorithm.name,
            cache=self.cache.name,
        )
        if canvas.length is not None:
            canvas.begin()
        return canvas

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
            "length": self.length.name,
            **self.length_options.model_dump(),
            **common,
            **own,
        }
