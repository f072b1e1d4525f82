"""Bodies of the routes that take a conversation, with one thing wrong in them."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import requests

from helpers.serving_harness import Server

_USER = {"role": "user", "content": "1+1="}
_RESULT = {"type": "tool_result", "tool_use_id": "c", "content": []}
_CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
_MESSAGES: list[dict[str, Any]] = [
    {"role": "system", "content": "a"},
    {"role": "user", "content": [{"type": "text", "text": "1"}]},
    {"role": "assistant", "content": "2", "reasoning_content": "a", "name": "b"},
    {"role": "assistant", "content": None, "tool_calls": [_CALL]},
    {"role": "tool", "tool_call_id": "c", "content": "3"},
]
_ITEMS: list[dict[str, Any]] = [
    {
        "type": "message",
        "role": "user",
        "content": [{"type": "input_text", "text": ""}],
    },
    {"role": "assistant", "content": [{"type": "output_text", "text": "2"}], "id": "a"},
    {"role": "developer", "content": "a", "status": "completed"},
    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "a"}]},
    {"type": "reasoning", "content": [{"text": "a"}], "encrypted_content": "a"},
    {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
    {"type": "custom_tool_call", "call_id": "c", "name": "f", "input": "a"},
    {"type": "function_call_output", "call_id": "c", "output": [{"text": "3"}]},
    {"role": "user", "content": [{"type": "input_image", "image_url": "a"}]},
]
_BLOCKS: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "1"}]},
    {"role": "user", "content": [{"type": "image", "source": {"type": "url"}}]},
    {"role": "user", "content": [_RESULT | {"content": [{"type": "text"}]}]},
    {"role": "assistant", "content": [{"type": "thinking", "thinking": "a"}]},
    {
        "role": "assistant",
        "content": [{"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
    },
]

ODD: list[Any] = [None, True, 5, 1.5, "", "x", [], {}, [5], ["x"], [[]], {"a": 1}]


def odd_bodies() -> Iterator[tuple[str, dict[str, Any]]]:
    """The route and a body of each request. Some happen to be sound."""
    for path, key, items, rest in (
        ("/v1/chat/completions", "messages", _MESSAGES, {"max_tokens": 1}),
        ("/v1/responses", "input", _ITEMS, {"max_output_tokens": 1}),
        ("/v1/messages", "messages", _BLOCKS, {"max_tokens": 1}),
        ("/v1/messages/count_tokens", "messages", _BLOCKS, {}),
        ("/api/chat", "messages", _MESSAGES, {"options": {"num_predict": 1}}),
        ("/tokenize", "messages", _MESSAGES, {}),
    ):
        for item in items:
            for odd in _spoilt(item):
                yield path, {"model": "demo", **rest, key: [_USER, odd]}
    for odd in _spoilt([{"type": "text", "text": "a"}]):
        body = {"model": "demo", "max_tokens": 1, "messages": [_USER]}
        yield "/v1/messages", {**body, "system": odd}


def odd_tools() -> Iterator[tuple[str, dict[str, Any]]]:
    """The same for the tools of a request, and for its choice of one."""
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    function = {"name": "f", "description": "a", "parameters": schema}
    named = {"name": "f"}
    for path, key, rest, tool, choice in (
        (
            *("/v1/chat/completions", "messages", {"max_tokens": 1}),
            {"type": "function", "function": function},
            {"type": "function", "function": named},
        ),
        (
            *("/v1/responses", "input", {"max_output_tokens": 1}),
            {"type": "function", **function},
            {"type": "function", **named},
        ),
        (
            *("/v1/messages", "messages", {"max_tokens": 1}),
            {"name": "f", "description": "a", "input_schema": schema},
            {"type": "tool", **named},
        ),
    ):
        body = {"model": "demo", key: [_USER], **rest}
        for odd in _spoilt(tool):
            yield path, {**body, "tools": [odd]}
        for odd in _spoilt(choice):
            yield path, {**body, "tools": [tool], "tool_choice": odd}


def check_refusals(
    server: Server, bodies: Iterable[tuple[str, dict[str, Any]]]
) -> None:
    """Each body is served or refused, and none brings a traceback into the log."""
    size = server.log.stat().st_size

    def send(one: tuple[str, dict[str, Any]]) -> tuple[int, Any]:
        answer = requests.post(server.base_url + one[0], json=one[1], timeout=100)
        return answer.status_code, (*one, answer.text[:300])

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(send, bodies))
    assert [one for status, one in answers if status not in (200, 400)] == []
    assert {status for status, _ in answers} == {200, 400}
    with server.log.open("rb") as log:
        log.seek(size)
        assert b"Traceback" not in log.read()


def _spoilt(value: Any) -> Iterator[Any]:
    """Copies of a value; in each, one thing inside is missing or another one."""
    yield copy.deepcopy(value)
    yield from ODD
    places = value if isinstance(value, dict) else range(len(value))
    for place in places:
        inner = value[place]
        changes = [*_spoilt(inner)] if isinstance(inner, dict | list) else ODD
        for change in changes:
            changed = copy.copy(value)
            changed[place] = change
            yield changed
        if isinstance(value, dict):
            yield {key: one for key, one in value.items() if key != place}
