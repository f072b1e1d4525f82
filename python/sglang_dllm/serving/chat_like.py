"""Bodies that SGLang turns into chat: OpenAI's responses and Anthropic's messages.

SGLang's models of these bodies drop fields that they do not have, without a word.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from sglang_dllm.serving.bad_request import refused
from sglang_dllm.serving.fields import (
    AnthropicFields,
    ChatFields,
    ResponseFields,
    check_fields,
)
from sglang_dllm.serving.logprobs import check_response_logprobs
from sglang_dllm.serving.unsupported import (
    all_tokens,
    defaults_of,
    without_unsupported,
)

_REASON = "full-attention diffusion models do not implement it"
_STATEFUL = ("prompt", "conversation", "context_management")
_LOGPROBS = "message.output_text.logprobs"


def check_responses(
    body: Mapping[str, Any], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """Check a body of /v1/responses.

    Args:
        defaults: the sampling of a request that names none.

    Returns:
        The body that SGLang reads.

    Raises:
        BadRequest: status 400, naming field, value and range.
    """
    from sglang.srt.entrypoints.openai.protocol import ResponsesRequest

    from sglang_dllm.upstream.compat import responses_have_logprobs

    given = dict(body)
    _check_text(given.pop("text", None))
    for key in _STATEFUL:
        if given.get(key):
            raise refused(key, given[key], "the text itself, in input")
    found = _checked(given, defaults, ResponseFields, ResponsesRequest)
    check_response_logprobs(found, _LOGPROBS, is_served=responses_have_logprobs())
    return found


def _check_text(text: Any) -> None:
    """Refuse a form of the answer other than plain text."""
    if text is None:
        return
    if not isinstance(text, dict):
        raise refused("text", text, "an object")
    form = text.get("format")
    if form is not None and form != {"type": "text"}:
        plain = {"type": "text"}
        raise refused("text.format", form, f"{plain} or nothing: {_REASON}")
    if text.get("verbosity") not in (None, "medium"):
        raise refused("text.verbosity", text["verbosity"], "'medium' or nothing")


def check_anthropic(
    body: Mapping[str, Any], defaults: Mapping[str, Any], has_reasoning: bool
) -> dict[str, Any]:
    """Check a body of /v1/messages.

    Args:
        defaults: the sampling of a request that names none.
        has_reasoning: whether the server has a --reasoning-parser.

    Returns:
        The body that SGLang reads.

    Raises:
        BadRequest: status 400, naming field, value and range.
    """
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    found = _checked(body, defaults, AnthropicFields, AnthropicMessagesRequest)
    # SGLang refuses these two as well, with a traceback in the log.
    thinking = found.get("thinking") or {"type": "disabled"}
    if thinking.get("type") != "disabled" and not has_reasoning:
        expected = "{'type': 'disabled'} or nothing without --reasoning-parser"
        raise refused("thinking", thinking, expected)
    for i, message in enumerate(found["messages"]):
        blocks = message.get("content")
        kinds = [
            block.get("type")
            for block in (blocks if isinstance(blocks, list) else ())
            if isinstance(block, dict)
        ]
        if "redacted_thinking" in kinds:
            raise refused(f"messages.{i}.content", "redacted_thinking", "readable text")
    form = found.get("output_config", {}).get("format")
    if form is not None:
        raise refused("output_config.format", form, f"nothing: {_REASON}")
    return found


def check_count_tokens(body: Mapping[str, Any]) -> dict[str, Any]:
    """Check a body of /v1/messages/count_tokens, which asks for no answer.

    Raises:
        BadRequest: status 400, naming field, value and range.
    """
    check_fields(AnthropicFields, {"max_tokens": 1, **body})
    return dict(body)


def _checked(
    body: Mapping[str, Any],
    defaults: Mapping[str, Any],
    implemented: type[BaseModel],
    upstream: type[Any],
) -> dict[str, Any]:
    check_fields(implemented, body)
    theirs = defaults_of(upstream)  # type: ignore[arg-type]
    found = without_unsupported(body, implemented, theirs, unknown_allowed=True)
    chat = {**defaults_of(ChatFields), "custom_params": None}
    known = {**chat, **defaults_of(implemented)}
    # SGLang would drop these without a word.
    for key in found:
        is_dropped = key in known and key not in theirs and key != "stream_options"
        if is_dropped and found[key] != known[key]:
            is_length = key in ("max_tokens", "max_completion_tokens")
            there = "max_output_tokens" if is_length else "it on /v1/chat/completions"
            raise refused(key, found[key], there)
    return {**defaults, **all_tokens(found)}


def response_usage(prompt_tokens: int, completion_tokens: int | None) -> dict[str, Any]:
    """The counts of tokens by the names of /v1/responses."""
    written = completion_tokens or 0
    return {
        "input_tokens": prompt_tokens,
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt_tokens + written,
    }
