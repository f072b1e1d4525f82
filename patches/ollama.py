"""sglang.srt.entrypoints.ollama.serving

Upstream: reads a body only under the content type of JSON. Its chat passes a template's
whole output as token ids. A stream loses the text of its last piece and is cut where
its request is refused. Without a length it asks for 2048 tokens. /api/version is
missing.
Ours: its routes are answered through the OpenAI handlers (``serving.ollama_routes``).
Goes when: upstream answers these routes through its OpenAI handlers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sglang_dllm.upstream.hooks import Hook


def _init(original: Callable[..., Any], self: Any, tokenizer_manager: Any) -> Any:
    from sglang_dllm.serving.request_checks import checks_of

    found = original(self, tokenizer_manager)
    checks = checks_of(tokenizer_manager)
    if checks is None:
        return found
    from sglang.srt.entrypoints.http_server import (
        app,
        ollama_chat,
        ollama_generate,
        ollama_show,
    )

    from sglang_dllm.serving.ollama_routes import OllamaRoutes

    names = {"chat": ollama_chat, "generate": ollama_generate, "show": ollama_show}
    OllamaRoutes(self, checks).replace(app.router.routes, names)
    return found


HOOKS = (
    Hook(
        target="sglang.srt.entrypoints.ollama.serving.OllamaServing.__init__",
        fn=_init,
        why="chat fails, a stream loses its text, and most of Ollama's options are "
        "ignored",
        contract=("self", "tokenizer_manager"),
        remove_when="upstream answers Ollama's routes through its OpenAI handlers",
    ),
)
