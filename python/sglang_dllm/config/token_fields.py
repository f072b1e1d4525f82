"""The fields of a request that ban or prefer tokens, and the edits that they come to.

``logit_bias`` and ``min_new_tokens`` are SGLang's own sampling parameters. The others
travel in the ``dllm`` object: SGLang has no place for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from pydantic import Field

from sglang_dllm.config.resolve import dllm_object, parse_options
from sglang_dllm.decoding.options import StrictModel
from sglang_dllm.decoding.token_edits import TokenEdits
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import ModelFacts

Ids = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class TokenFields(StrictModel):
    """The keys of the ``dllm`` object, as the scheduler gets them.

    Attributes:
        allowed_token_ids: the only tokens of the answer.
        bad_words: sequences of tokens that the answer does not have.
    """

    allowed_token_ids: (
        Annotated[Ids, Field(description="a list of at least 1 token id")] | None
    ) = None
    bad_words: Annotated[
        tuple[Ids, ...], Field(strict=False, description="lists of token ids")
    ] = ()


def token_edits_of(
    params: Any, ends: Iterable[int], facts: ModelFacts
) -> TokenEdits | None:
    """The edits that a request asks for, None if it asks for none.

    Args:
        params: with the attributes of SGLang's ``SamplingParams``. Its
            ``custom_params`` have token ids only.
        ends: the tokens at which the answer may end.

    Raises:
        OptionError: a field has a wrong form, or a position could come to have no
            token.
    """
    given = dllm_object(params.custom_params)
    keys = TokenFields.model_fields
    fields = parse_options(TokenFields, {k: given[k] for k in keys if k in given})
    bias = _bias_of(params.logit_bias or {})
    least = params.min_new_tokens or 0
    if not (bias or fields.allowed_token_ids or fields.bad_words or least):
        return None
    ids = [*bias, *(fields.allowed_token_ids or ())]
    for token in [*ids, *(token for word in fields.bad_words for token in word)]:
        if not 0 <= token < facts.vocab_size:
            expected = f"token ids, 0 to {facts.vocab_size - 1}"
            raise OptionError(
                "logit_bias, allowed_token_ids, bad_words", token, expected
            )
    words = {tuple(word) for word in fields.bad_words}
    for word in words:
        if len(word) == 1:
            bias[word[0]] = -math.inf
    allowed = fields.allowed_token_ids
    edits = TokenEdits(
        bias=tuple(sorted(bias.items())),
        allowed=None if allowed is None else tuple(sorted(set(allowed))),
        min_tokens=least,
        ends=tuple(sorted(set(ends))) if least else (),
        # A canvas never holds the mask token where a token is known.
        words=tuple(sorted(w for w in words if len(w) > 1 and facts.mask_id not in w)),
    )
    if not len(edits.safe_tokens(facts.vocab_size, facts.mask_id)):
        raise OptionError(
            "logit_bias, allowed_token_ids, bad_words",
            "no token left",
            "at least one token that may be anywhere: it is in no bad word, "
            "and with min_tokens it ends no answer",
        )
    return edits


def _bias_of(given: Mapping[Any, float]) -> dict[int, float]:
    try:
        return {int(token): float(value) for token, value in given.items()}
    except (TypeError, ValueError, AttributeError):
        raise OptionError("logit_bias", given, "numbers by token id") from None
