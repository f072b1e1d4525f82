"""Fields that are not implemented are refused, unless their value changes nothing.

An ignored field would give another answer than the client asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from sglang_dllm.grammar.forms import NATIVE
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.foreign_fields import MODIFIERS, NEUTRAL, NOT_IMPLEMENTED

# SGLang's own models check these. They reach the chat template only.
_SGLANG_CHECKS = ("reasoning_effort", "reasoning")

_FORM = "response_format, or sampling_params.json_schema, has a place for it"
_REGEX = "regex has a place for it"
_PENALTY = "no paper states a penalty for canvases, whose tokens come in any order"
_LEAST = (
    "it is min_tokens on /v1/chat/completions and /v1/completions, and "
    "sampling_params.min_new_tokens on /generate"
)
_INSTEAD = {
    "suffix": "custom_params.dllm.canvas has a place for it",
    "dllm": "custom_params.dllm has a place for it",
    **dict.fromkeys(("guided_json", "json_schema", "structured_outputs"), _FORM),
    **dict.fromkeys(("guided_regex", "guided_choice", "choice"), _REGEX),
    **dict.fromkeys(("guided_grammar", "grammar"), "ebnf has a place for it"),
    "min_p": "/v1/chat/completions, /v1/completions and /generate have it",
    **dict.fromkeys(("min_tokens", "min_new_tokens", "min_length"), _LEAST),
    **dict.fromkeys(("frequency_penalty", "presence_penalty"), _PENALTY),
    **dict.fromkeys(("repetition_penalty", "repeat_penalty", "rep_pen"), _PENALTY),
}
"""Fields that other routes have, or have by another name, and the reasons of others."""


@cache
def defaults_of(upstream: type[Any]) -> dict[str, Any]:
    """The default of each field of one of SGLang's request models."""
    if issubclass(upstream, BaseModel):
        return {key: field.default for key, field in upstream.model_fields.items()}
    if dataclasses.is_dataclass(upstream):
        return {field.name: field.default for field in dataclasses.fields(upstream)}
    names = upstream.__struct_fields__
    return dict(zip(names, upstream.__struct_defaults__, strict=True))


def all_tokens(params: dict[str, Any]) -> dict[str, Any]:
    """``top_k`` 0 is another engine's word for all tokens, and SGLang's is -1."""
    return params | {"top_k": -1} if params.get("top_k") == 0 else params


def without_unsupported(
    data: Mapping[str, Any],
    implemented: type[BaseModel],
    upstream_defaults: Mapping[str, Any],
    *,
    unknown_allowed: bool,
    prefix: str = "",
) -> dict[str, Any]:
    """The data without null and without fields that are switched off.

    SGLang uses some values before it checks them, so that one which changes nothing
    may still fail there.

    Args:
        data: field names and values as the client gave them.
        implemented: the fields that are served.
        upstream_defaults: SGLang's fields, with their defaults.
        unknown_allowed: let fields pass that are in neither (an OpenAI client's
            ``store``, ``metadata``, …), unless another engine has them.

    Raises:
        BadRequest: for the first field that would have to be ignored.
    """
    kept = {}
    for key, value in data.items():
        if value is None or (value == "" and key in NATIVE):
            continue
        if key in implemented.model_fields or key in _SGLANG_CHECKS:
            kept[key] = value
        elif key in upstream_defaults or key in NEUTRAL:
            neutral = NEUTRAL.get(key, ())
            if not _changes_nothing(value, (upstream_defaults.get(key), *neutral)):
                shown = "".join(f"{one!r} or " for one in neutral)
                reason = _INSTEAD.get(key, NOT_IMPLEMENTED)
                raise refused(prefix + key, value, f"{shown}nothing: {reason}")
        elif unknown_allowed:
            kept[key] = value
        elif key not in MODIFIERS:
            raise BadRequest(
                f"{prefix}{key} is not a known field; "
                f"expected one of {', '.join(implemented.model_fields)}"
            )
    return kept


def _changes_nothing(value: Any, neutral: tuple[Any, ...]) -> bool:
    if value in ("", [], {}):
        return not any(isinstance(one, int | float) for one in neutral)
    return any(
        value == one and isinstance(value, bool) == isinstance(one, bool)
        for one in neutral
    )
