"""sglang.srt.entrypoints.http_server

Upstream: FastAPI reads a body through ``ORJSONRequest.json`` and coerces it; many
wrong bodies end in status 500, and a streamed /generate answers 200 before the
request is looked at.
Ours: the parsed body is checked on its way to FastAPI (``serving.body``), the
prompts of a streamed /generate included, so that every refusal is a status 400.
Goes when: upstream validates strictly and primes the /generate stream as it does
the OpenAI ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


async def _json(original: Callable[..., Any], request: Any) -> Any:
    from sglang.srt.entrypoints.http_server import get_global_state

    from sglang_dllm.patches.tokenizer_manager import is_ours

    state = get_global_state()
    if state is None or not is_ours(state.tokenizer_manager):
        return await original(request)
    if hasattr(request, "_json"):
        return await original(request)
    from json import JSONDecodeError

    from sglang_dllm.patches.tokenizer_manager import check_prompts, served_model
    from sglang_dllm.serving.body import check_body, explain_malformed

    manager = state.tokenizer_manager
    try:
        body = await original(request)
    except JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos}"
        raise explain_malformed(await request.body(), problem) from None
    path = request.url.path
    body = request._json = check_body(path, body, served_model(manager))
    if path == "/generate" and body.get("stream"):
        await check_prompts(manager, body)
    return body


HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.http_server.ORJSONRequest.json",
        fn=_json,
        why="bodies are coerced or fail with status 500; a stream is answered with "
        "200 before its request is checked",
        contract=("self",),
        remove_when="upstream validates bodies strictly, before it answers",
    ),
)
