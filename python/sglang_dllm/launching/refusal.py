"""Status 503: the server takes no request now, and says when to come back."""

from __future__ import annotations

import json
from typing import Any

from starlette.types import Send


async def refuse(
    send: Send, path: str, message: str, retry_after: int, closes: bool = False
) -> None:
    """Answer 503 with ``Retry-After``, in the form that clients of the route expect.

    Args:
        path: of the route.
        retry_after: seconds, 1 or more.
        closes: ask the client to open its next connection anew.
    """
    body = json.dumps(_error(path, message)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"retry-after", str(retry_after).encode()),
    ]
    if closes:
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": 503, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _error(path: str, message: str) -> dict[str, Any]:
    if path.startswith("/v1/messages"):
        named = {"type": "overloaded_error", "message": message}
        return {"type": "error", "error": named}
    if path.startswith("/api/"):
        return {"error": message}
    error = {"message": message, "type": "ServiceUnavailable"}
    more = {"param": None, "code": 503}
    if path.startswith("/v1/responses"):
        return {"error": {**error, **more}}
    return {"object": "error", **error, **more}
