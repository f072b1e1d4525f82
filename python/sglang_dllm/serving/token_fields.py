"""Checks of the fields that ban or prefer tokens: OpenAI's, SGLang's and vLLM's.

``logit_bias`` stays where it is. SGLang has no ``allowed_token_ids`` and no
``bad_words``, so both move to the ``dllm`` object, where any route may give them too.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import SimpleNamespace
from typing import Any

from sglang_dllm.config.resolve import CUSTOM_PARAMS_KEY, OPTIONS_PATH, dllm_object
from sglang_dllm.config.token_fields import TokenFields, token_edits_of
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.fields import check_token_ids

MOST_BIAS = 100
MAX_BAD_WORDS = 256
MAX_WORD_LENGTH = 256

_KEYS = tuple(TokenFields.model_fields)
_OPTIONS = f"{OPTIONS_PATH}."
_WORDS = (
    f"up to {MAX_BAD_WORDS} words, each a string of 1 to {MAX_WORD_LENGTH} characters "
    f"or a list of 1 to {MAX_WORD_LENGTH} token ids"
)


def moved_token_fields(
    params: Mapping[str, Any], vocab_size: int, prefix: str = ""
) -> dict[str, Any]:
    """Check these fields of a body or of sampling parameters.

    Returns:
        The same with ``allowed_token_ids`` and ``bad_words`` in the ``dllm`` object.

    Raises:
        BadRequest: naming field, value and range.
    """
    found = dict(params)
    if found.get("logit_bias") == {}:
        del found["logit_bias"]
    if found.get("logit_bias") is not None:
        _check_bias(f"{prefix}logit_bias", found["logit_bias"], vocab_size)
    given = {key: found.pop(key) for key in _KEYS if key in found}
    given = {key: value for key, value in given.items() if value is not None}
    _check_given(given, vocab_size, prefix)
    custom = found.get("custom_params") or {}
    options = (
        (custom.get(CUSTOM_PARAMS_KEY) or {}) if isinstance(custom, dict) else None
    )
    if not isinstance(custom, dict) or not isinstance(options, dict):
        return found  # ``check_request`` names it.
    _check_given({k: options[k] for k in _KEYS if k in options}, vocab_size, _OPTIONS)
    for key in given.keys() & options.keys():
        if options[key] is not None and options[key] != given[key]:
            raise refused(_OPTIONS + key, options[key], f"nothing beside {prefix}{key}")
    given = {key: value for key, value in given.items() if value}
    if given:
        found["custom_params"] = {**custom, CUSTOM_PARAMS_KEY: {**options, **given}}
    return found


def with_word_ids(
    custom_params: dict[str, Any] | None, tokenizer: Any
) -> dict[str, Any] | None:
    """The parameters with the token ids of the bad words.

    A word is banned as it is at the start of a text, and as it is behind a space, as in
    vLLM. Only these tokens are banned: other tokens of the same text are not.

    Args:
        tokenizer: of transformers; None where the server has none.

    Raises:
        BadRequest: a word has no tokens, or there is no tokenizer.
    """
    options = dllm_object(custom_params)
    if custom_params is None or not options.get("bad_words"):
        return custom_params
    words = [ids for word in options["bad_words"] for ids in _ids_of(word, tokenizer)]
    return {**custom_params, CUSTOM_PARAMS_KEY: {**options, "bad_words": words}}


def check_edits(
    params: Mapping[str, Any],
    facts: ModelFacts,
    length_field: str,
) -> dict[str, Any]:
    """Check that the fields leave a token, and an answer that is long enough.

    Args:
        params: with ``max_new_tokens``.
        length_field: in which the client asks for the length of the answer.

    Returns:
        The keys for the resolved ``dllm`` object.

    Raises:
        BadRequest: naming field, value and range.
    """
    least, most = params.get("min_new_tokens") or 0, params["max_new_tokens"]
    if least > most:
        native = length_field == "max_new_tokens"
        field = "min_new_tokens" if native else "min_tokens"
        raise refused(field, least, f"an integer, 0 to {length_field}={most}")
    custom = params.get("custom_params")
    asked = SimpleNamespace(
        custom_params=custom,
        logit_bias=params.get("logit_bias"),
        min_new_tokens=least,
    )
    ends: Iterable[int] = (*facts.eos_ids, *(params.get("stop_token_ids") or ()))
    try:
        token_edits_of(asked, ends, facts)
    except OptionError as error:
        raise BadRequest(
            f"{error.key}: {error.value}; expected {error.expected}"
        ) from None
    options = dllm_object(custom)
    return {key: options[key] for key in _KEYS if options.get(key)}


def _check_bias(field: str, bias: Any, vocab_size: int) -> None:
    expected = (
        f"an object with token ids, 0 to {vocab_size - 1}, as strings, "
        f"and numbers, -{MOST_BIAS} to {MOST_BIAS}"
    )
    if not isinstance(bias, dict):
        raise refused(field, bias, expected)
    for key, value in bias.items():
        is_id = re.fullmatch(r"0|[1-9]\d{0,9}", str(key)) and not isinstance(key, bool)
        if not is_id or int(key) >= vocab_size:
            raise refused(field, {key: value}, expected)
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not -MOST_BIAS <= value <= MOST_BIAS:
            raise refused(f"{field}.{key}", value, expected)


def _check_given(given: Mapping[str, Any], vocab_size: int, prefix: str) -> None:
    allowed, words = given.get("allowed_token_ids"), given.get("bad_words")
    if allowed is not None:
        if not _is_ids(allowed):
            raise refused(
                f"{prefix}allowed_token_ids", allowed, "a list of at least 1 token id"
            )
        check_token_ids(f"{prefix}allowed_token_ids", allowed, vocab_size)
    if words is None:
        return
    field = f"{prefix}bad_words"
    if not isinstance(words, list) or len(words) > 2 * MAX_BAD_WORDS:
        raise refused(field, words, _WORDS)
    for word in words:
        is_word = bool(word.strip()) if isinstance(word, str) else _is_ids(word)
        if not is_word or len(word) > MAX_WORD_LENGTH:
            raise refused(field, word, _WORDS)
        if not isinstance(word, str):
            check_token_ids(field, word, vocab_size)


def _is_ids(value: Any) -> bool:
    is_list = isinstance(value, list) and bool(value)
    return is_list and all(type(token) is int for token in value)


def _ids_of(word: str | list[int], tokenizer: Any) -> list[list[int]]:
    if not isinstance(word, str):
        return [word]
    if tokenizer is None:
        raise refused("bad_words", word, "lists of token ids: there is no tokenizer")
    found: list[list[int]] = []
    for text in (word, " " + word.lstrip()):
        ids = tokenizer.encode(text, add_special_tokens=False)
        if not ids or len(ids) > MAX_WORD_LENGTH:
            raise refused("bad_words", word, _WORDS)
        if ids not in found:
            found.append(ids)
    return found
