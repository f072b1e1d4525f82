"""From the bytes of a body to JSON, or to a refusal that names the field."""

from __future__ import annotations

import json
import math
from json import JSONDecodeError
from typing import Any

import orjson
from starlette.requests import Request

from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.body_limits import check_parts


async def read_body(request: Request) -> Any:
    """The JSON body of a route of ours, which FastAPI does not read.

    Raises:
        BadRequest: it is no JSON, or too large a tree.
    """
    raw = await request.body()
    try:
        body = orjson.loads(raw)
    except JSONDecodeError as error:
        problem = f"{error.msg} at character {error.pos}"
        raise explain_malformed(raw, problem) from None
    check_parts(body)
    return body


def explain_malformed(raw: bytes, problem: str) -> BadRequest:
    """The refusal of a body that the strict JSON parser rejected.

    Python's parser accepts more than the strict one: NaN, Infinity, numbers too large
    for a double, and lone surrogates. So it can name the field that has one.
    """
    try:
        path = _not_json("", json.loads(raw))
    except (ValueError, RecursionError):
        path = None
    if path is None:
        return BadRequest(f"body: malformed JSON, {problem}")
    field, value = path
    return refused(field or "body", value, "finite numbers and valid Unicode text")


def _not_json(path: str, value: Any) -> tuple[str, Any] | None:
    """Path and value of the first part that strict JSON does not have."""
    if isinstance(value, dict):
        for key, item in value.items():
            shown = key.encode("ascii", "backslashreplace").decode()
            if found := _not_json("", key):
                return shown, found[1]
            if found := _not_json(f"{path}.{shown}" if path else shown, item):
                return found
    elif isinstance(value, list):
        for i, item in enumerate(value):
            if found := _not_json(f"{path}[{i}]", item):
                return found
    elif isinstance(value, float):
        return None if math.isfinite(value) else (path, value)
    elif isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            return path, value
    return None
