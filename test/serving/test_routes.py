"""Every route of SGLang is answered, refused or management; none is forgotten."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.middleware import Middleware

from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.serving.body import CHECKS
from sglang_dllm.serving.body_limits import BodyLimit
from sglang_dllm.serving.page import Page, algorithms_route
from sglang_dllm.serving.routes import (
    ANSWERED,
    MANAGEMENT,
    REFUSED,
    OwnPaths,
    RefusedRoutes,
)


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
    # serving.ollama and serving.score_route check what they make of these.
    without_checks |= {"/api/chat", "/api/generate", "/v1/score"}
    assert set(CHECKS) == set(ANSWERED) - without_checks


def test_the_page_has_every_route() -> None:
    page = (Path(__file__).parents[2] / "docs" / "routes.md").read_text()
    for path in (*ANSWERED, *REFUSED):
        last = path.removeprefix("/v1") if "tokenize" in path else path
        assert f"`{last}`" in page, path
    for instead, reason in REFUSED.values():
        assert f"`{instead}`" in page and reason in page


@pytest.fixture
def client(request: pytest.FixtureRequest) -> TestClient:
    """SGLang's check of keys, and a server of ours, around three routes."""
    from sglang.srt.utils.auth import add_api_key_middleware

    app = FastAPI()
    for path in ("/v1/embeddings", "/generate", "/v1/messages", "/health"):
        app.api_route(path, methods=["GET", "POST"])(lambda: "reached")

    @app.get("/url")
    async def url(request: Request) -> str:
        return str(request.url)

    checks = SimpleNamespace(
        manager=SimpleNamespace(
            served_model_name="demo", max_req_input_len=90, tokenizer=None
        ),
        facts=SimpleNamespace(family=FAMILIES["DreamModel"]),
        decode=parse_decode_config("Dream", FAMILIES["DreamModel"], {}),
    )
    app.router.routes.append(algorithms_route(checks))  # type: ignore[arg-type]
    app.user_middleware.append(Middleware(RefusedRoutes))
    key = getattr(request, "param", None)
    if key is not None:
        add_api_key_middleware(app, api_key=key, admin_api_key=None)
    build = app.build_middleware_stack
    app.build_middleware_stack = lambda: OwnPaths(Page(build()))  # type: ignore
    # As uvicorn does, the client of tests puts no root path before a path.
    return TestClient(app, root_path="/dllm")


PREFIXES = ["", "/dllm", "/dllm/dllm"]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_refused_route_names_the_one_to_use(client: TestClient, prefix: str) -> None:
    refusal = client.post(f"{prefix}/v1/embeddings", json={"input": "a"})
    assert refusal.status_code == 400
    assert "/v1/chat/completions" in refusal.json()["message"]
    assert client.post(f"{prefix}/generate").json() == "reached"
    assert client.get(f"{prefix}/url").json().endswith("testserver/url")
    assert client.get("/dllms/generate").status_code == 404


@pytest.mark.parametrize("client", ["k"], indirect=True)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_keys_are_asked_for_by_the_route_s_own_path(
    client: TestClient, prefix: str
) -> None:
    """Probes need no key, and a refusal needs one as all other answers."""
    assert client.get(f"{prefix}/health").status_code == 200
    for path in ("/generate", "/v1/messages", "/v1/embeddings"):
        assert client.post(prefix + path).status_code == 401
        wrong = client.post(prefix + path, headers={"x-api-key": "wrong"})
        assert wrong.status_code == 401
    bearer = {"Authorization": "Bearer k"}
    assert client.post(f"{prefix}/generate", headers=bearer).json() == "reached"
    key = {"x-api-key": "k"}
    assert client.post(f"{prefix}/v1/messages", headers=key).json() == "reached"
    assert client.post(f"{prefix}/generate", headers=key).status_code == 401


@pytest.mark.parametrize("client", [None, "k"], indirect=True)
@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_page_is_open_and_its_data_are_not(
    client: TestClient, request: pytest.FixtureRequest, prefix: str
) -> None:
    """A person types the page's address, with which a browser sends no key."""
    key = request.node.callspec.params["client"]
    for path in ("/dllm", "/dllm/"):
        page = client.get(prefix + path)
        assert page.status_code == 200 and "<!doctype html>" in page.text
        assert "default-src 'none'" in page.headers["content-security-policy"]
        assert client.head(prefix + path).text == ""
    found = client.get(f"{prefix}/dllm/algorithms")
    assert found.status_code == (401 if key else 200)
    bearer = {"Authorization": "Bearer k"}
    found = client.get(f"{prefix}/dllm/algorithms", headers=bearer)
    assert found.json()["default"] == "Dream"
    assert client.post(f"{prefix}/dllm").status_code == (401 if key else 404)


DENIAL = "websocket.http.response"


@pytest.mark.parametrize(
    ("extensions", "expected"),
    [
        ({}, ["websocket.close"]),
        ({DENIAL: {}}, [f"{DENIAL}.start", f"{DENIAL}.body"]),
    ],
)
def test_a_refused_web_socket_is_not_opened(
    extensions: dict[str, Any], expected: list[str]
) -> None:
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "websocket", "path": "/v1/realtime", "extensions": extensions}
    asyncio.run(RefusedRoutes(None)(scope, None, send))  # type: ignore[arg-type]
    assert [one["type"] for one in sent] == expected
    assert sent[0].get("status", 400) == 400


def test_the_middleware_is_around_the_application(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang.srt.entrypoints import http_server

    from sglang_dllm.patches.http_server import _set_global_state

    app = FastAPI()
    monkeypatch.setattr(http_server, "app", app)
    monkeypatch.setattr(
        "sglang_dllm.serving.request_checks.checks_of", lambda manager: manager
    )
    ours = SimpleNamespace(decode=SimpleNamespace(max_body_bytes=1024))
    for is_ours in (None, ours):
        state = SimpleNamespace(tokenizer_manager=is_ours)
        assert _set_global_state(lambda same: same, state) is state
        stack = app.build_middleware_stack()
        assert isinstance(stack, OwnPaths) == (is_ours is not None)
    assert [one.cls for one in app.user_middleware] == [RefusedRoutes, BodyLimit]
