"""``GET /dllm``: a page to watch canvases fill, and the list of algorithms it reads."""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_dllm.config.catalogue import catalogue
from sglang_dllm.config.resolve import DEFAULT_MAX_NEW_TOKENS
from sglang_dllm.serving.routes import ALGORITHMS, PAGE

if TYPE_CHECKING:
    from sglang_dllm.serving.request_checks import RequestChecks

# The page talks to its own server alone. No text of a model can bring in a script.
_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'unsafe-inline'; "
    "style-src 'unsafe-inline'; img-src data:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}


class Page:
    """ASGI middleware, outside of the check of keys: the page.

    A browser sends no key with an address that a person types. The page holds no data,
    and the routes that it calls ask for the key.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_page = scope["type"] == "http" and scope["path"].rstrip("/") == PAGE
        if is_page and scope["method"] in ("GET", "HEAD"):
            await HTMLResponse(_html(), headers=_HEADERS)(scope, receive, send)
        else:
            await self._app(scope, receive, send)


@cache
def _html() -> str:
    return files("sglang_dllm.serving").joinpath("page.html").read_text("utf-8")


def algorithms_route(checks: RequestChecks) -> Route:
    """The route of the machine-readable list."""

    async def answer(_: Request) -> JSONResponse:
        return JSONResponse(_described(checks))

    return Route(ALGORITHMS, answer, methods=["GET"])


def _described(checks: RequestChecks) -> dict[str, Any]:
    manager = checks.manager
    return {
        "model": manager.served_model_name,
        "family": checks.facts.family.sampler_family,
        "has_chat_template": bool(getattr(manager.tokenizer, "chat_template", None)),
        "context_length": manager.max_req_input_len,
        "max_new_tokens": DEFAULT_MAX_NEW_TOKENS,
        **catalogue(checks.decode),
    }
