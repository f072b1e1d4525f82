"""Every route of a server asks for the key, but those on a list with a name."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from sglang.srt.entrypoints import http_server
from sglang.srt.utils.auth import add_api_key_middleware
from starlette.responses import PlainTextResponse
from starlette.routing import Mount, Route, WebSocketRoute

from sglang_dllm.config.server import parse_decode_config
from sglang_dllm.launching.doorkeeper import Doorkeeper
from sglang_dllm.models.facts import FAMILIES
from sglang_dllm.patches.http_server import _set_global_state
from sglang_dllm.serving.ollama_routes import OllamaRoutes
from sglang_dllm.serving.routes import PAGE, REFUSED

KEY, ADMIN = {"Authorization": "Bearer k"}, {"Authorization": "Bearer admin"}
METRICS = "/metrics"
OPEN = {"/health", "/health_generate", "/ready", METRICS, PAGE}
"""Routes without a key: probes and metrics, as in SGLang, and the page without data."""


def walk(routes: Any) -> Iterator[Any]:
    for route in routes:
        inner = getattr(route, "original_router", None)
        yield from [route] if inner is None else walk(inner.routes)


def _stand_in() -> Any:
    return lambda _: PlainTextResponse("reached")


async def reached(scope: Any, receive: Any, send: Any) -> None:
    await PlainTextResponse("reached")(scope, receive, send)


def server(monkeypatch: pytest.MonkeyPatch, **keys: str | None) -> FastAPI:
    """SGLang's routes and ours, behind all that a server puts around them.

    No endpoint of SGLang runs: each answers that it was reached.
    """
    manager = SimpleNamespace(
        served_model_name="demo",
        max_req_input_len=90,
        tokenizer=None,
        server_args=SimpleNamespace(tokenizer_worker_num=1),
    )
    family = FAMILIES["DreamModel"]
    checks: Any = SimpleNamespace(
        manager=manager,
        facts=SimpleNamespace(family=family),
        decode=parse_decode_config("Dream", family, {}),
    )
    app = FastAPI(openapi_url="/openapi.json")
    for route in walk(http_server.app.router.routes):
        if isinstance(route, WebSocketRoute) or not hasattr(route, "methods"):
            app.router.routes.append(route)
            continue
        methods = sorted(route.methods)
        stand_in = Route(
            route.path, lambda _: PlainTextResponse("reached"), methods=methods
        )
        level = getattr(route.endpoint, "_auth_level", None)
        if level is not None:
            stand_in.endpoint._auth_level = level  # type: ignore[attr-defined]
        app.router.routes.append(stand_in)
    metrics = Mount(METRICS, reached)
    # As SGLang has it.
    metrics.path_regex = re.compile("^/metrics(?P<path>.*)$")
    app.router.routes.append(metrics)
    OllamaRoutes(None, checks).replace(app.router.routes, {})
    launch: Any = SimpleNamespace(is_draining=False, answering=nullcontext)
    door: Any = {"queue": None, "queued_paths": (), "on_refusal": None}
    app.add_middleware(
        Doorkeeper, launch=launch, is_up=lambda: True, on_startup=lambda: None, **door
    )
    monkeypatch.setattr(http_server, "app", app)
    monkeypatch.setattr(
        "sglang_dllm.serving.request_checks.checks_of", lambda manager: checks
    )
    state: Any = SimpleNamespace(tokenizer_manager=manager)
    _set_global_state(lambda same: same, state)
    add_api_key_middleware(app, **{"api_key": None, "admin_api_key": None, **keys})
    return app


def requests_of(app: FastAPI) -> Iterator[tuple[str, str]]:
    """Method and path of each route."""
    for route in walk(app.router.routes):
        path = re.sub(r"\{.*?\}", "x", route.path)
        for method in getattr(route, "methods", None) or ():
            yield method, path
    yield from (("GET", METRICS), ("GET", "/dllm"), ("HEAD", "/dllm"))


@pytest.mark.parametrize("prefix", ["", "/pre", "/pre/pre"])
def test_every_route_asks_for_the_key(
    monkeypatch: pytest.MonkeyPatch, prefix: str
) -> None:
    app = server(monkeypatch, api_key="k")
    client = TestClient(app, root_path="/pre", raise_server_exceptions=False)
    found = set(requests_of(app))
    for path in ("/dllm/state", "/dllm/algorithms", "/v1/score", "/api/version"):
        assert path in {one for _, one in found}
    for method, path in sorted(found):
        headers: tuple[dict[str, str], ...] = ({}, ADMIN, {"x-api-key": "wrong"})
        for header in headers:
            answer = client.request(method, prefix + path, headers=header)
            is_open = path in OPEN and method in ("GET", "HEAD")
            assert (answer.status_code != 401) == is_open, (method, path)
        answer = client.request(method, prefix + path, headers=KEY)
        assert answer.status_code != 401, (method, path)


def test_management_asks_for_the_key_of_the_admin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    app = server(monkeypatch, api_key="k", admin_api_key="admin")
    client = TestClient(app, raise_server_exceptions=False)
    for path in ("/abort_request", "/update_weights_from_tensor", "/flush_cache"):
        assert client.post(path, headers=KEY).status_code == 401
        assert client.post(path, headers=ADMIN).text == "reached"
    for path in ("/dllm/state", "/dllm/algorithms"):
        assert client.get(path, headers=ADMIN).status_code == 401
        assert client.get(path, headers=KEY).status_code != 401


@pytest.mark.parametrize("host", ["a/health", "a/metrics?", "a/ready#", "a\\health"])
def test_a_host_is_no_way_around_the_key(
    monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    """SGLang reads the path from an address that the host is a part of."""

    def path_of(request: Any) -> Any:
        sent = request.headers.get("host", "server")
        # As older versions of Starlette made it.
        return SimpleNamespace(path=_path(f"http://{sent}{request.scope['path']}"))

    monkeypatch.setattr("starlette.requests.Request.url", property(path_of))
    client = TestClient(server(monkeypatch, api_key="k"))
    answer = client.post("/generate", headers={"Host": host}, json={"text": "a"})
    assert answer.status_code == 401
    assert client.get("/health", headers={"Host": "a.b:80"}).status_code == 200


def _path(address: str) -> str:
    from urllib.parse import urlsplit

    return urlsplit(address).path


def test_web_sockets_have_no_key_and_are_refused() -> None:
    """SGLang's check of keys lets them pass."""
    sockets = {
        route.path
        for route in walk(http_server.app.router.routes)
        if isinstance(route, WebSocketRoute)
    }
    assert sockets <= set(REFUSED)


def test_the_list_is_documented() -> None:
    page = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    for path in OPEN:
        assert f"`{path}`" in page
