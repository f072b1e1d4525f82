"""sglang.srt.entrypoints.http_server, and the keys of its routes

Upstream: FastAPI reads a body through ``ORJSONRequest.json`` and coerces it. Many
wrong bodies end in status 500. A streamed /generate answers 200 before its request is
checked. Behind ``--fastapi-root-path`` probes and metrics need the API key.
Ours: the parsed body is checked on its way to FastAPI (``serving.request_checks``), the
prompts of a streamed /generate included, so that every refusal is a status 400. A
path is the route's own, whatever a proxy has put before it.
Goes when: upstream validates strictly and checks a streamed /generate before it
answers, as it does on the OpenAI routes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


async def _json(original: Callable[..., Any], request: Any) -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    from sglang_dllm.serving.request_checks import checks_of

    state = get_global_state()
    checks = None if state is None else checks_of(state.tokenizer_manager)
    # Starlette calls this again for a body that it has read; it was checked then.
    if checks is None or hasattr(request, "_json"):
        return await original(request)
    request._json = await checks.check_json(request, lambda: original(request))
    return request._json


def _decide_request_auth(
    original: Callable[..., Any],
    method: str,
    path: str,
    authorization_header: str | None,
    api_key: str | None,
    admin_api_key: str | None,
    auth_level: Any,
) -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    from sglang_dllm.serving.request_checks import checks_of
    from sglang_dllm.upstream.compat import in_effect

    state = get_global_state()
    if state is not None and checks_of(state.tokenizer_manager) is not None:
        root = in_effect(state.tokenizer_manager.server_args).fastapi_root_path
        path = path.removeprefix(root)
    return original(
        method=method,
        path=path,
        authorization_header=authorization_header,
        api_key=api_key,
        admin_api_key=admin_api_key,
        auth_level=auth_level,
    )


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
        target="sglang.srt.utils.auth.decide_request_auth",
        fn=_decide_request_auth,
        why="behind --fastapi-root-path the open routes are asked for a key",
        contract=(
            *("method", "path", "authorization_header", "api_key", "admin_api_key"),
            "auth_level",
        ),
        remove_when="upstream decides by the route's own path",
    ),
)
