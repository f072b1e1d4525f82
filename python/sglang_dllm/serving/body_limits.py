"""Bounds of a body, before it is parsed and before a check walks through it."""

from __future__ import annotations

import json
from typing import Any

from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.routes import MANAGEMENT, App, Receive, Scope, Send

MAX_DEPTH = 200
"""Lists and objects inside of each other. Python fails to write a value of some 900."""

MAX_PARTS = 16_384
"""Lists and objects of a body: its messages, tools, schemas, prompts of token ids."""

_TOO_LARGE = 413


class BodyLimit:
    """ASGI middleware, inside of the check of keys: larger bodies get status 413.

    Management is left out: a body of ``/update_weights_from_tensor`` is a model.
    """

    def __init__(self, app: App, most: int) -> None:
        """
        Args:
            most: bytes.
        """
        self._app, self._most = app, most

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in MANAGEMENT:
            await self._app(scope, receive, send)
            return
        told = dict(scope["headers"]).get(b"content-length", b"")
        if told.isdigit():
            # The server reads no more than it is told.
            if int(told) > self._most:
                await self._refuse(send)
            else:
                await self._app(scope, receive, send)
            return
        messages, size = [], 0
        while True:
            message = await receive()
            messages.append(message)
            size += len(message.get("body", b""))
            if size > self._most:
                await self._refuse(send)
                return
            if message["type"] != "http.request" or not message.get("more_body"):
                break
        messages.reverse()

        async def again() -> Any:
            return messages.pop() if messages else await receive()

        await self._app(scope, again, send)

    async def _refuse(self, send: Send) -> None:
        message = (
            f"body: it is too large; expected at most {self._most} bytes "
            "(max_body_bytes of --dllm-algorithm-config)"
        )
        error = {"object": "error", "message": message, "type": "BadRequestError"}
        body = json.dumps({**error, "param": None, "code": _TOO_LARGE}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            # The rest of the body would be read as the next request.
            (b"connection", b"close"),
        ]
        start = {"type": "http.response.start", "status": _TOO_LARGE}
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})


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
