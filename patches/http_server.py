"""sglang.srt.entrypoints.http_server

Upstream: FastAPI reads a body through ``ORJSONRequest.json`` and coerces it. Many
wrong bodies end in status 500. A streamed /generate answers 200 before its request is
checked. Behind ``--fastapi-root-path`` probes and metrics need the API key. Routes of
other kinds of models fail in their middle.
Ours: the parsed body is checked on its way to FastAPI (``serving.request_checks``), the
prompts of a streamed /generate included, so that every refusal is a status 400. A
path is the route's own, whatever a proxy has put before it, and routes that the model
does not serve are refused (``serving.routes``). A body has bounds before it is parsed
(``serving.body_limits``), and no refusal names a file of this machine. A page shows
how canvases fill (``serving.page``), and a route tells the active ones
(``serving.state``).
Goes when: upstream validates strictly and checks a streamed /generate before it
answers, as it does on the OpenAI routes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


async def _json(original: Callable[..., Any], request: Any) -> Any:
    from sglang_dllm.serving.request_checks import checks_of_server

    checks = checks_of_server()
    # Starlette calls this again for a body that it has read; it was checked then.
    if checks is None or hasattr(request, "_json"):
        return await original(request)
    with checks.refusals.counted("body"):
        request._json = await checks.check_json(request, lambda: original(request))
    return request._json


def _set_global_state(original: Callable[..., Any], global_state: Any) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    found = original(global_state)
    checks = checks_of(global_state.tokenizer_manager)
    if checks is not None:
        from fastapi.exceptions import RequestValidationError
        from sglang.srt.entrypoints.http_server import app
        from starlette.middleware import Middleware

        from sglang_dllm.serving.bad_request import without_places
        from sglang_dllm.serving.body_limits import BodyLimit
        from sglang_dllm.serving.page import Page, algorithms_route
        from sglang_dllm.serving.routes import OwnPaths, RefusedRoutes
        from sglang_dllm.serving.score_route import score_route
        from sglang_dllm.serving.state import state_route

        handlers = app.exception_handlers
        handlers[RequestValidationError] = without_places(
            handlers[RequestValidationError]
        )
        build = app.build_middleware_stack
        app.user_middleware.append(Middleware(RefusedRoutes))
        most = checks.decode.max_body_bytes
        app.user_middleware.append(Middleware(BodyLimit, most=most))
        own = [algorithms_route(checks), state_route(checks), score_route(checks)]
        # The first route of a path answers it.
        app.router.routes[:0] = own
        # SGLang adds the check of keys later, and each one goes around the others.
        app.build_middleware_stack = lambda: OwnPaths(Page(build()))
    return found


HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.http_server.ORJSONRequest.json",
        fn=_json,
        why="bodies are coerced or fail with status 500; a stream is answered with "
        "200 before its request is checked",
        contract=("self",),
        remove_when="upstream validates bodies strictly, before it answers",
    ),
    Hook(
        target="sglang.srt.entrypoints.http_server.set_global_state",
        fn=_set_global_state,
        why="routes that need another kind of model fail in its middle; behind "
        "--fastapi-root-path the open routes are asked for a key; a key of Anthropic's "
        "clients is not read",
        contract=("global_state",),
        remove_when="upstream lets a model say which routes it serves, and compares "
        "the route's own path",
    ),
)
