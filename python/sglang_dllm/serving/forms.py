"""The form of an answer, as OpenAI's clients ask for it."""

from __future__ import annotations

from typing import Any

from sglang_dllm.serving.bad_request import BadRequest, refused

_FIELD = "response_format"
_TYPES = "an object with type text, json_object or json_schema"


def with_form(body: dict[str, Any]) -> dict[str, Any]:
    """The body without a form that changes nothing.

    Raises:
        BadRequest: a form is wrong, or there are two.
    """
    form = body.get(_FIELD)
    if form is not None and form.get("type") == "text":
        body = {key: value for key, value in body.items() if key != _FIELD}
        form = None
    if form is not None:
        _check(form)
    given = [key for key in (_FIELD, "regex", "ebnf") if body.get(key)]
    if len(given) > 1:
        raise BadRequest(f"{', '.join(given)}: expected one of them")
    return body


def _check(form: dict[str, Any]) -> None:
    match form.get("type"):
        case "json_object":
            return
        case "json_schema":
            inner = form.get("json_schema")
            has_schema = isinstance(inner, dict) and isinstance(
                inner.get("schema"), dict
            )
            if (
                has_schema
                and inner is not None
                and isinstance(inner.get("name", ""), str)
            ):
                return
            raise refused(
                f"{_FIELD}.json_schema", inner, "an object with a name and a schema"
            )
        case other:
            raise refused(f"{_FIELD}.type", other, _TYPES)
