"""Bodies that SGLang turns into chat: OpenAI's responses and Anthropic's messages.

SGLang's models of these bodies drop fields that they do not have, without a word.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextvars import ContextVar
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
from sglang_dllm.serving.tool_calls import check_choice
from sglang_dllm.serving.unsupported import (
    all_tokens,
    defaults_of,
    without_unsupported,
)

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
    text = _checked_text(given.pop("text", None))
    for key in _STATEFUL:
        if given.get(key):
            raise refused(key, given[key], "the text itself, in input")
    found = _checked(given, defaults, ResponseFields, ResponsesRequest)
    check_response_logprobs(found, _LOGPROBS, is_served=responses_have_logprobs())
    TEXT_FORMAT.set(None if text is None else text["format"])
    if text is not None:
        # An SGLang that has no place for it drops it; the hook on its sampling
        # parameters does not.
        found["text"] = text
    return found


TEXT_FORMAT: ContextVar[dict[str, Any] | None] = ContextVar("TEXT_FORMAT", default=None)
"""The form of the answer that a request of /v1/responses asks for."""


def text_schema() -> str | None:
    """The JSON schema that the present request of /v1/responses asks for."""
    form = TEXT_FORMAT.get()
    if form is None:
        return None
    return json.dumps(form.get("schema", {"type": "object"}))


def _checked_text(text: Any) -> dict[str, Any] | None:
    """The object ``text`` where it asks for a form other than plain text."""
    if text is None:
        return None
    if not isinstance(text, dict):
        raise refused("text", text, "an object")
    if text.get("verbosity") not in (None, "medium"):
        raise refused("text.verbosity", text["verbosity"], "'medium' or nothing")
    form = text.get("format")
    if form is None or form == {"type": "text"}:
        return None
    kind = form.get("type") if isinstance(form, dict) else None
    if kind not in ("json_object", "json_schema"):
        types = "an object with type text, json_object or json_schema"
        raise refused("text.format", form, types)
    if kind == "json_object":
        return {"format": {"type": kind}}
    name = form.get("name")
    if not isinstance(form.get("schema"), dict) or not isinstance(name, str):
        expected = "an object with type json_schema, a name and a schema"
        raise refused("text.format", form, expected)
    return {"format": form}


def check_anthropic(
    body: Mapping[str, Any],
    defaults: Mapping[str, Any],
    has_reasoning: bool,
    has_tool_calls: bool,
) -> dict[str, Any]:
    """Check a body of /v1/messages.

    Args:
        defaults: the sampling of a request that names none.
        has_reasoning: whether the server has a --reasoning-parser.
        has_tool_calls: whether it has a --tool-call-parser.

    Returns:
        The body that SGLang reads.

    Raises:
        BadRequest: status 400, naming field, value and range.
    """
    from sglang.srt.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    from sglang_dllm.upstream.compat import (
        messages_have_formats,
        messages_have_strict_tools,
    )

    body = _with_output_config(body)
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
    form = (found.get("output_config") or {}).get("format")
    forms = [] if form is None else ["output_config.format"]
    check_choice(found, forms, has_parser=has_tool_calls)
    for i, tool in enumerate(found.get("tools") or []):
        if tool.get("strict") and not messages_have_strict_tools():
            there = "false with this SGLang; the tool on /v1/chat/completions"
            raise refused(f"tools[{i}].strict", True, there)
    if form is None:
        return found
    is_schema = isinstance(form, dict) and form.get("type") == "json_schema"
    if not is_schema or not isinstance(form.get("schema"), dict):
        expected = "an object with type json_schema and a schema"
        raise refused("output_config.format", form, expected)
    if not messages_have_formats():
        there = "nothing with this SGLang; response_format on /v1/chat/completions"
        raise refused("output_config.format", form, there)
    return found


def _with_output_config(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with the form in its place; Anthropic's clients had another before."""
    found = dict(body)
    form, config = found.pop("output_format", None), found.get("output_config")
    if form is None or (config is not None and not isinstance(config, dict)):
        return found
    if (config or {}).get("format") not in (None, form):
        raise refused("output_format", form, "nothing beside output_config.format")
    return found | {"output_config": {**(config or {}), "format": form}}


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
