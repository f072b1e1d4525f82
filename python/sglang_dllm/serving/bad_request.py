"""The error of a refused request: one line with field, value and what is allowed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import HTTPException
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.responses import JSONResponse

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


def error_answer(
    message: str, status: int = 400, headers: Mapping[str, str] | None = None
) -> JSONResponse:
    """The answer of an error, in the form of SGLang's OpenAI routes."""
    kind = "BadRequestError" if status < 500 else "InternalServerError"
    error = {"object": "error", "message": message, "type": kind}
    return JSONResponse({**error, "param": None, "code": status}, status, headers)


def unreadable(field: str, error: Exception) -> BadRequest:
    """The refusal of what SGLang cannot read: its models, or code of its own.

    Args:
        field: that SGLang read, for errors that name none.
        error: a pydantic ValidationError names a place; the first one is told.
    """
    if not isinstance(error, ValidationError):
        return BadRequest(f"{field} is not allowed: {error}")
    first = error.errors(include_url=False, include_context=False)[0]
    # Between the fields are names of classes.
    path = [str(one) for one in first["loc"] if str(one).islower() or type(one) is int]
    return refused(".".join(path) or field, first["input"], first["msg"])


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
