"""Fields that SGLang has and full-attention diffusion models do not implement.

A request with such a field is refused, unless the value changes nothing: an ignored
field would give another answer than the client asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from functools import cache
from typing import Any

from pydantic import BaseModel

from sglang_dllm.serving.bad_request import BadRequest, refused

# Values that change nothing, though they are not the field's default.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0,),
    "min_tokens": (0,),
    "min_new_tokens": (0,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "best_of": (1,),
    "top_logprobs": (0,),
    "top_logprobs_num": (0,),
    "logprob_start_len": (-1,),
    "return_logprob": (False,),
    "return_sampling_mask": (False,),
    "response_format": ({"type": "text"},),
    "tool_choice": ("auto", "none"),
}

# Sampling fields of other engines or of SGLang's other routes. SGLang's OpenAI models
# drop them without a word. A rule cannot replace the list: the other unknown fields of
# an OpenAI client (``store``, ``metadata``) pass.
_FOREIGN = (
    *("typical_p", "top_a", "tfs", "mirostat", "dynatemp_range", "epsilon_cutoff"),
    *("length_penalty", "use_beam_search", "beam_width", "early_stopping"),
    *("guided_json", "guided_regex", "guided_choice", "guided_grammar"),
    *("structured_outputs", "grammar", "json_object", "choice"),
    *("prompt_logprobs", "bad_words", "allowed_token_ids", "logits_processors"),
    *("functions", "function_call", "prediction", "audio"),
    *("thinking_budget", "max_thinking_tokens", "structural_tag", "json_schema"),
    *("max_new_tokens", "sampling_seed", "suffix", "echo", "return_logprob"),
)

# SGLang's own models check these. They reach the chat template only.
_SGLANG_CHECKS = ("reasoning_effort", "reasoning")


@cache
def defaults_of(upstream: type[Any]) -> dict[str, Any]:
    """The default of each field of one of SGLang's request models."""
    if issubclass(upstream, BaseModel):
        return {key: field.default for key, field in upstream.model_fields.items()}
    if dataclasses.is_dataclass(upstream):
        return {field.name: field.default for field in dataclasses.fields(upstream)}
    names = upstream.__struct_fields__
    return dict(zip(names, upstream.__struct_defaults__, strict=True))


def refuse_unsupported(
    data: Mapping[str, Any],
    implemented: type[BaseModel],
    upstream_defaults: Mapping[str, Any],
    *,
    unknown_allowed: bool,
    prefix: str = "",
) -> None:
    """Refuse every field that would have to be ignored.

    Args:
        data: field names and values as the client gave them.
        implemented: the fields that are served.
        upstream_defaults: SGLang's fields, with their defaults.
        unknown_allowed: let fields pass that are in neither (an OpenAI client's
            ``store``, ``metadata``, …), unless another engine has them.

    Raises:
        BadRequest: for the first one.
    """
    for key, value in data.items():
        if key in implemented.model_fields or key in _SGLANG_CHECKS:
            continue
        known = key in upstream_defaults or key in _FOREIGN or key in _NEUTRAL
        if not known and not unknown_allowed:
            raise BadRequest(
                f"{prefix}{key} is not a known field; "
                f"expected one of {', '.join(implemented.model_fields)}"
            )
        if not known or _changes_nothing(key, value, upstream_defaults.get(key)):
            continue
        neutral = "".join(f"{one!r} or " for one in _NEUTRAL.get(key, ()))
        raise refused(
            prefix + key,
            value,
            f"{neutral}nothing: full-attention diffusion models do not implement it",
        )


def _changes_nothing(key: str, value: Any, default: Any) -> bool:
    if value is None or value in ("", [], {}):
        return True
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool)
        for neutral in (default, *_NEUTRAL.get(key, ()))
    )
