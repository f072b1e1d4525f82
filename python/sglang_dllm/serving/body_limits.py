"""Bounds of a body, before it is parsed and before a check walks through it."""

from __future__ import annotations

from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from sglang_dllm.serving.bad_request import BadRequest, error_answer, refused
from sglang_dllm.serving.routes import ANSWERED, MANAGEMENT

MAX_DEPTH = 200
"""Lists and objects inside of each other. Python fails to write a value of some 900."""

MAX_PARTS = 16_384
"""Lists and objects of a body: its messages, tools, schemas, prompts of token ids."""

_TOO_LARGE = 413

_JSON_ALONE = frozenset(path for path in ANSWERED if not path.startswith("/api/"))
"""Routes of FastAPI, which hands the bytes of any other type to SGLang's models: some
fail then with status 500. Ollama's clients name no type, or a wrong one."""


class BodyLimit:
    """ASGI middleware, inside of the check of keys: larger bodies get status 413.

    A body that is not said to be JSON gets 400 where the route reads JSON. Management
    is left out: a body of ``/update_weights_from_tensor`` is a model.
    """

    def __init__(self, app: ASGIApp, most: int) -> None:
        """
        Args:
            most: bytes.
        """
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in MANAGEMENT:
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        media = headers.get(b"content-type", b"").decode("latin-1")
        if scope["path"] in _JSON_ALONE and media and not _is_json(media):
            refusal = refused("content-type", media, "application/json")
            await error_answer(str(refusal))(scope, receive, send)
            return
        told = headers.get(b"content-length", b"")
        if told.isdigit():
            # The server reads no more than it is told.
            if int(told) > self._most:
                await self._refusal()(scope, receive, send)
            else:
                await self._app(scope, receive, send)
            return
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._most:
                await self._refusal()(scope, receive, send)
                return
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        messages.reverse()

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)

    def _refusal(self) -> Response:
        message = (
            f"body: it is too large; expected at most {self._most} bytes "
            "(max_body_bytes of --dllm-algorithm-config)"
        )
        # The rest of the body would be read as the next request.
        return error_answer(message, _TOO_LARGE, {"Connection": "close"})


def _is_json(media: str) -> bool:
    kind = media.partition(";")[0].strip().lower()
    return kind.startswith("application/") and kind.endswith(("/json", "+json"))


def check_parts(body: Any) -> None:
    """Refuse a body that nests too deeply, or has too many lists and objects.

    Raises:
        BadRequest: naming the bound.
    """
    level, num = [body], 0
    for _ in range(MAX_DEPTH):
        level = [
            item
            for one in level
            if isinstance(one, dict | list)
            for item in (one.values() if isinstance(one, dict) else one)
            if isinstance(item, dict | list)
        ]
        num += len(level)
        if num > MAX_PARTS:
            raise BadRequest(
                f"body: it has too many parts; expected at most {MAX_PARTS} lists and "
                "objects"
            )
        if not level:
            return
    raise BadRequest(
        f"body: it nests too deeply; expected at most {MAX_DEPTH} lists and objects "
        "inside of each other"
    )
