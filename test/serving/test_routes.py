"""Every route of SGLang is answered, refused or management; none is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from sglang_dllm.serving.body import CHECKS
from sglang_dllm.serving.routes import ANSWERED, MANAGEMENT, REFUSED, RefusedRoutes


def walk(routes: Iterable[Any]) -> Iterator[Any]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        if inner is not None:
            yield from walk(inner.routes)
        else:
            yield route


def routes_that_take_something() -> set[str]:
    """Routes of the installed SGLang with a body, and web sockets."""
    from sglang.srt.entrypoints.http_server import app

    found = set()
    for route in walk(app.routes):
        methods = getattr(route, "methods", None)
        if methods is None or methods & {"POST", "PUT", "DELETE", "PATCH"}:
            found.add(route.path)
    return found


def test_every_route_has_one_place() -> None:
    known = [*ANSWERED, *REFUSED, *MANAGEMENT]
    assert len(set(known)) == len(known)
    assert routes_that_take_something() - set(known) == set()


def test_what_is_answered_is_checked() -> None:
    without_checks = {"/tokenize", "/v1/tokenize", "/api/show"}
    without_checks.add("/v1/messages/count_tokens")
    assert set(CHECKS) == set(ANSWERED) - without_checks


def test_the_page_has_every_route() -> None:
    page = (Path(__file__).parents[2] / "docs" / "routes.md").read_text()
    for path in (*ANSWERED, *REFUSED):
        last = path.removeprefix("/v1") if "tokenize" in path else path
        assert f"`{last}`" in page, path
    for instead, reason in REFUSED.values():
        assert f"`{instead}`" in page and reason in page


def guarded(root_path: str = "") -> TestClient:
    app = FastAPI(root_path=root_path)
    app.post("/v1/embeddings")(lambda: "reached")
    app.post("/generate")(lambda: "reached")
    app.add_middleware(RefusedRoutes)
    return TestClient(app, root_path=root_path)


@pytest.mark.parametrize("root_path", ["", "/dllm"])
def test_a_refused_route_names_the_one_to_use(root_path: str) -> None:
    client = guarded(root_path)
    for prefix in {"", root_path}:
        refusal = client.post(f"{prefix}/v1/embeddings", json={"input": "a"})
        assert refusal.status_code == 400, prefix
        assert "/v1/chat/completions" in refusal.json()["message"]
        assert client.post(f"{prefix}/generate").json() == "reached"


def test_a_refused_web_socket_is_closed() -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime"}
    asyncio.run(RefusedRoutes(None)(scope, None, send))  # type: ignore[arg-type]
    assert [one["type"] for one in sent] == ["websocket.close"]
