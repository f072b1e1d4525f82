"""The routes of a server: ours, SGLang's management, and those that are refused."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_dllm.serving.bad_request import error_answer

ANSWERED = MappingProxyType(
    {
        "/v1/chat/completions": "OpenAI chat",
        "/v1/completions": "OpenAI completions",
        "/v1/responses": "OpenAI responses, without state between two of them",
        "/v1/messages": "Anthropic messages",
        "/v1/messages/count_tokens": "Anthropic: the tokens of a request",
        "/generate": "SGLang's own",
        "/invocations": "SageMaker: a body of `/v1/chat/completions`",
        "/vertex_generate": "Vertex AI: a list of prompts of `/generate`",
        "/v1/score": "log-likelihoods of items behind a query",
        "/api/chat": "Ollama chat",
        "/api/generate": "Ollama completions",
        "/api/show": "Ollama: facts of the model",
        "/tokenize": "token ids of a text",
        "/v1/tokenize": "token ids of a text",
        "/detokenize": "text of token ids",
        "/v1/detokenize": "text of token ids",
    }
)
"""Routes that take a request for the model, and what they speak."""

_WITHOUT_CANVAS = ("count_tokens", "tokenize", "detokenize", "show")
QUEUED = frozenset(
    path for path in ANSWERED if path.rpartition("/")[2] not in _WITHOUT_CANVAS
)
"""The routes whose requests are canvases, which may wait."""

_CHAT = "/v1/chat/completions"
_NO_SCORES = "the model gives no scores or embeddings"
_NO_SESSIONS = "a canvas keeps nothing from one request for the next"

REFUSED: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "/encode": ("/generate", _NO_SCORES),
        "/classify": ("/generate", _NO_SCORES),
        "/v1/embeddings": (_CHAT, _NO_SCORES),
        "/v1/classify": (_CHAT, _NO_SCORES),
        "/v1/rerank": (_CHAT, _NO_SCORES),
        "/v1/decisions": (_CHAT, _NO_SCORES),
        "/v1/systemone": (_CHAT, _NO_SCORES),
        "/v1/audio/transcriptions": (_CHAT, "the model takes text only"),
        "/v1/realtime": (_CHAT, "the model takes text only"),
        "/open_session": ("/generate", _NO_SESSIONS),
        "/close_session": ("/generate", _NO_SESSIONS),
        "/load_lora_adapter": ("/generate", "adapters are not supported"),
        "/load_lora_adapter_from_tensors": ("/generate", "adapters are not supported"),
        "/unload_lora_adapter": ("/generate", "adapters are not supported"),
    }
)
"""Routes of SGLang that a full-attention model does not serve: the route to use
instead, and the reason."""

MANAGEMENT = frozenset(
    {
        *("/abort_request", "/pause_generation", "/continue_generation"),
        *("/flush_cache", "/freeze_gc", "/slow_down", "/configure_logging"),
        *("/update_weights_from_disk", "/update_weights_from_tensor"),
        *("/update_weights_from_distributed", "/update_weights_from_ipc"),
        *("/update_weight_version", "/begin_weight_update", "/end_weight_update"),
        *("/init_weights_update_group", "/destroy_weights_update_group"),
        "/init_weights_send_group_for_remote_instance",
        *("/send_weights_to_remote_instance", "/get_weights_by_name"),
        *("/weights_checker", "/set_internal_state", "/set_trace_level"),
        *("/release_memory_occupation", "/resume_memory_occupation"),
        *("/start_profile", "/stop_profile", "/scale_elastic_ep", "/pd_role_switch"),
        *("/start_expert_distribution_record", "/stop_expert_distribution_record"),
        *("/dump_expert_distribution_record", "/parse_function_call"),
        *("/separate_reasoning", "/add_external_corpus", "/remove_external_corpus"),
        *("/hicache/storage-backend", "/hicache/storage-backend/clear"),
        "/clear_hicache_storage_backend",
        "/v1/responses/{response_id}/cancel",
    }
)
"""Routes of SGLang that change something and ask the model nothing."""


PAGE, ALGORITHMS, STATE = "/dllm", "/dllm/algorithms", "/dllm/state"
"""Routes of ours, which take no body (``serving.page``, ``serving.state``)."""

_HOST = re.compile(rb"[\w.:%\[\]-]*")
_WITH_LINKS = ("/docs", "/redoc", "/openapi.json")
"""Pages of FastAPI whose links need the path that a proxy has put before them."""


class OwnPaths:
    """ASGI middleware, outside of all others: each request has its route's own path.

    uvicorn puts --fastapi-root-path before each path, and a proxy that does not strip
    it sends it once more. SGLang compares some paths as they are: those that need no
    key, and those whose errors have another form. Without the prefix it answers as a
    server without the flag. Anthropic's clients send their key in a header of their
    own.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope = _with_plain_host(_with_bearer(_with_own_path(scope)))
        await self._app(scope, receive, send)


def _with_plain_host(scope: Scope) -> Scope:
    """The scope without a Host header that names no host, such as ``a/health``.

    SGLang's check of keys takes a path from Starlette's address of the request, and
    older versions of Starlette put the host in front of the path as it was sent.
    """
    is_plain = all(
        name != b"host" or _HOST.fullmatch(value) for name, value in scope["headers"]
    )
    if is_plain:
        return scope
    return {**scope, "headers": [one for one in scope["headers"] if one[0] != b"host"]}


def _with_own_path(scope: Scope) -> Scope:
    root = scope.get("root_path", "").rstrip("/")
    path, raw = scope["path"], scope.get("raw_path") or b""
    for _ in range(2):
        # The prefix may have the name of a route of ours.
        is_ours = path.rstrip("/") in (PAGE, ALGORITHMS, STATE)
        if root and path.startswith(root + "/") and not is_ours:
            path = path.removeprefix(root)
            raw = raw.removeprefix(root.encode())
    if not root or path in _WITH_LINKS:
        return scope
    return {**scope, "path": path, "raw_path": raw, "root_path": ""}


def _with_bearer(scope: Scope) -> Scope:
    headers = dict(scope["headers"])
    key = headers.get(b"x-api-key")
    if key is None or b"authorization" in headers or not _is_anthropic(scope["path"]):
        return scope
    bearer = (b"authorization", b"Bearer " + key)
    return {**scope, "headers": [*scope["headers"], bearer]}


def _is_anthropic(path: str) -> bool:
    return path.startswith(("/v1/messages", "/v1/models"))


class RefusedRoutes:
    """ASGI middleware, inside of all others: refused routes get status 400."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope.get("path", "")
        instead, reason = REFUSED.get(path, ("", ""))
        if not instead or scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        message = f"{path} is not served: {reason}; expected {instead}"
        is_socket = scope["type"] == "websocket"
        if is_socket and "websocket.http.response" not in scope.get("extensions", {}):
            await send({"type": "websocket.close", "code": 1008, "reason": message})
            return
        await error_answer(message)(scope, receive, send)
