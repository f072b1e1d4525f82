"""Bodies that are too large, too deep or have too many parts are refused early."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server

from sglang_dllm.config.resolve import MAX_BODY_BYTES
from sglang_dllm.config.server import ServerConfig
from sglang_dllm.errors import ConfigError
from sglang_dllm.serving.bad_request import BadRequest, without_places
from sglang_dllm.serving.body_limits import (
    MAX_DEPTH,
    MAX_PARTS,
    BodyLimit,
    check_parts,
)
from sglang_dllm.serving.copies import unfold_copies
from sglang_dllm.serving.fields import MAX_PROMPTS

MOST = 100


def sent_through(
    chunks: list[bytes],
    told: int | None,
    path: str = "/generate",
    media: bytes = b"application/json",
) -> tuple[int, bytes, list[Any]]:
    """Status, body, and the messages that the application has read."""
    waiting = [
        {"type": "http.request", "body": chunk, "more_body": i < len(chunks) - 1}
        for i, chunk in enumerate(chunks)
    ]
    read: list[Any] = []
    sent: list[Any] = []

    async def receive() -> Any:
        return waiting.pop(0) if waiting else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        while not read or read[-1].get("more_body"):
            read.append(await receive())
        read.append(await receive())
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"reached"})

    headers = [] if told is None else [(b"content-length", str(told).encode())]
    headers.append((b"content-type", media))
    scope = {"type": "http", "path": path, "method": "POST", "headers": headers}
    asyncio.run(BodyLimit(app, MOST)(scope, receive, send))
    return sent[0]["status"], sent[1]["body"], read


@pytest.mark.parametrize("size", [0, 1, MOST])
@pytest.mark.parametrize("is_told", [True, False])
def test_a_body_of_the_largest_size_is_passed_on(size: int, is_told: bool) -> None:
    chunks = [b"x" * (size // 2), b"x" * (size - size // 2)]
    status, _, read = sent_through(chunks, size if is_told else None)
    assert status == 200
    assert b"".join(one.get("body", b"") for one in read) == b"x" * size
    assert read[-1] == {"type": "http.disconnect"}, "it hears of the client's end"


@pytest.mark.parametrize(
    ("chunks", "told"), [([b""], MOST + 1), ([b"x" * 60, b"x" * 60, b"x"], None)]
)
def test_a_larger_body_is_refused_before_it_is_parsed(
    chunks: list[bytes], told: int | None
) -> None:
    status, body, read = sent_through(chunks, told)
    assert (status, read) == (413, [])
    answer = json.loads(body)
    assert answer["code"] == 413
    assert f"expected at most {MOST} bytes" in answer["message"]


def test_a_body_of_the_management_is_a_model() -> None:
    path = "/update_weights_from_tensor"
    assert sent_through([b"x" * 999], 999, path)[0] == 200


def test_a_client_that_leaves_is_passed_on() -> None:
    async def receive() -> Any:
        return {"type": "http.disconnect"}

    seen: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        seen.append(await receive())

    scope = {"type": "http", "path": "/generate", "headers": []}
    asyncio.run(BodyLimit(app, MOST)(scope, receive, None))  # type: ignore[arg-type]
    assert seen == [{"type": "http.disconnect"}]


def nested(depth: int) -> Any:
    found: Any = 1
    for i in range(depth):
        found = [found] if i % 2 else {"a": found}
    return found


def test_depth_and_parts_have_bounds() -> None:
    check_parts(nested(MAX_DEPTH))
    with pytest.raises(BadRequest, match=f"at most {MAX_DEPTH} lists and objects"):
        check_parts(nested(MAX_DEPTH + 1))
    check_parts({"messages": [{}] * (MAX_PARTS - 2), "input_ids": [1] * 10**6})
    with pytest.raises(BadRequest, match=f"at most {MAX_PARTS} lists"):
        check_parts({"messages": [{}] * MAX_PARTS})
    for plain in (None, 5, "a", 1.5, True):
        check_parts(plain)


def test_answers_of_one_request_have_a_bound() -> None:
    def asked(num_prompts: int, n: int) -> Any:
        params = [{"n": n} for _ in range(num_prompts)]
        return SimpleNamespace(
            text=["a"] * num_prompts, sampling_params=params, rid=None, extra_key=None
        )

    unfold_copies(asked(MAX_PROMPTS // 128, 128))
    with pytest.raises(BadRequest, match=f"n=128 .* at most {MAX_PROMPTS} answers"):
        unfold_copies(asked(MAX_PROMPTS // 128 + 1, 128))


def test_the_largest_body_is_a_key_of_the_yaml_file() -> None:
    assert ServerConfig.parse({}).max_body_bytes == MAX_BODY_BYTES
    assert ServerConfig.parse({"max_body_bytes": 2048}).max_body_bytes == 2048
    for wrong in (0, 1023, "1 MB", True, 2**40):
        with pytest.raises(ConfigError, match="max_body_bytes"):
            ServerConfig.parse({"max_body_bytes": wrong})


def test_a_body_that_fastapi_refuses_names_no_file() -> None:
    """SGLang's handler sends FastAPI's text, which has the endpoint's file."""
    theirs = http_server.app.exception_handlers[RequestValidationError]
    texts = []
    for handler in (theirs, without_places(theirs)):
        app = FastAPI(exception_handlers={RequestValidationError: handler})

        @app.post("/x")
        async def x(number: int) -> int:
            return number

        answer = TestClient(app).post("/x?number=a")
        assert answer.status_code == 400
        assert "valid integer" in answer.json()["message"]
        texts.append(answer.text)
    assert __file__ in texts[0], "SGLang leaves it out now"
    assert __file__ not in texts[1]


@pytest.mark.parametrize(
    "media", [b"", b"application/json; charset=x", b"Application/vnd.api+JSON"]
)
def test_json_passes(media: bytes) -> None:
    assert sent_through([b"1"], 1, "/invocations", media)[0] == 200


@pytest.mark.parametrize("media", [b"json", b"text/plain", b"a/json", b"\xff"])
@pytest.mark.parametrize("path", ["/invocations", "/generate", "/v1/messages"])
def test_another_type_of_body_is_refused(path: str, media: bytes) -> None:
    status, body, read = sent_through([b"1"], 1, path, media)
    assert (status, read) == (400, [])
    assert b"expected application/json" in body
    assert sent_through([b"1"], 1, "/api/chat", media)[0] == 200
