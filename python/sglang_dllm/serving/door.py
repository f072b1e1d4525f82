"""The door: requests are checked here, before they are queued.

Every refusal is a ``RequestError`` that names the field, the value and what is
allowed; SGLang's HTTP layer answers it with status 400.
"""

from __future__ import annotations

from typing import Any

from sglang_dllm.config import DEFAULT_MAX_NEW_TOKENS
from sglang_dllm.errors import RequestError

# Sampling fields that change nothing at these values; others are not implemented.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_p": (0, None),
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "repetition_penalty": (1, None),
    "min_new_tokens": (0, None),
    "json_schema": (None, ""),
    "regex": (None, ""),
    "ebnf": (None, ""),
    "structural_tag": (None, ""),
    "logit_bias": (None, {}),
}


def check_request(
    params: dict[str, Any],
    input_ids: list[int] | None,
    vocab_size: int,
    max_canvas_len: int,
) -> None:
    """Refuse what the canvas cannot hold or the decoder does not implement.

    ``params['max_new_tokens']`` is filled in where the request names none.

    Args:
        params: the request's sampling parameters, changed in place.
        input_ids: the prompt.
        vocab_size: ids from 0 to vocab_size - 1 exist.
        max_canvas_len: prompt and answer together, in tokens.

    Raises:
        RequestError: with field, value and range.
    """
    if not input_ids:
        raise RequestError("input_ids: the prompt is empty; expected at least 1 token")
    for token in input_ids:
        if not 0 <= token < vocab_size:
            raise RequestError(
                f"input_ids: token id {token} is outside the vocabulary; "
                f"expected 0 to {vocab_size - 1}"
            )
    for field, neutral in _NEUTRAL.items():
        if params.get(field) not in neutral:
            raise RequestError(
                f"{field}={params[field]!r} is not supported by full-attention "
                f"diffusion models; leave it out or give {neutral[0]!r}"
            )
    room = max_canvas_len - len(input_ids)
    max_new_tokens = params.get("max_new_tokens")
    if max_new_tokens is None:
        max_new_tokens = params["max_new_tokens"] = max(
            1, min(DEFAULT_MAX_NEW_TOKENS, room)
        )
    if max_new_tokens > room:
        raise RequestError(
            f"max_new_tokens={max_new_tokens} does not fit: the prompt has "
            f"{len(input_ids)} tokens and a canvas holds {max_canvas_len}; "
            f"expected 1 to {max(room, 0)}"
        )
