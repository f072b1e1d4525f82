"""The error of a refused request: one line with field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError

from sglang_dllm.errors import RequestError

_LONGEST_VALUE = 80


class BadRequest(RequestError, HTTPException):
    """A RequestError that is status 400 on every route.

    SGLang's OpenAI routes turn a ValueError into status 400. Its other routes leave
    exceptions to FastAPI, which knows HTTPException. So this class is both.
    """

    def __init__(self, message: str) -> None:
        # The name of an unknown field is the client's: a line break or a lone surrogate
        # in it would break the answer, which is one line of UTF-8.
        message = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message)
        RequestError.__init__(self, message)
        self.status_code = 400
        self.detail = message
        self.headers = None

    def __str__(self) -> str:
        return str(self.detail)


def refused(field: str, value: Any, expected: str) -> BadRequest:
    """``field=value is not allowed; expected …``, with a long value shortened."""
    shown = ascii(value)
    if len(shown) > _LONGEST_VALUE:
        shown = shown[: _LONGEST_VALUE - 3] + "..."
    return BadRequest(f"{field}={shown} is not allowed; expected {expected}")


def without_places(
    handler: Callable[..., Awaitable[Any]],
) -> Callable[[Any, RequestValidationError], Awaitable[Any]]:
    """SGLang's handler of the bodies that FastAPI refuses.

    FastAPI's error names the endpoint's file and line, and SGLang would send it to the
    client: a path of this machine.
    """

    async def handle(request: Any, error: RequestValidationError) -> Any:
        plain = RequestValidationError(error.errors(), body=error.body)
        return await handler(request, plain)

    return handle
