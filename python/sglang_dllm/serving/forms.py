"""The form of an answer: as clients ask for it, and its checks at the door.

OpenAI's clients say ``response_format``, vLLM's say ``guided_…``, and SGLang's say
``regex`` and ``ebnf``. One of the last two or ``response_format`` is left.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.forms import NATIVE, Form, native_form, read_form
from sglang_dllm.grammar.tagged import goes_on, has_free_text
from sglang_dllm.serving.bad_request import BadRequest, refused
from sglang_dllm.serving.tool_calls import called_schemas

FIELD = "response_format"
_TYPES = "an object with type text, json_object, json_schema or structural_tag"
_NOTHING: tuple[Any, ...] = (None, "", [], {}, False)
_LENGTHS = ("fixed", "append")

_GUIDED = ("json", "regex", "choice", "grammar")
_OUTPUTS = "structured_outputs"
"""vLLM's fields: ``guided_json`` and so on, and later one object with these keys."""


def with_own_form(body: Mapping[str, Any]) -> dict[str, Any]:
    """The body with OpenAI's or SGLang's field in the place of vLLM's.

    Raises:
        BadRequest: a field of vLLM is wrong, or there are two.
    """
    found = dict(body)
    outputs = found.pop(_OUTPUTS, None)
    if outputs is not None and not isinstance(outputs, dict):
        raise refused(_OUTPUTS, outputs, f"an object with one of {', '.join(_GUIDED)}")
    given = {f"{_OUTPUTS}.{key}": value for key, value in (outputs or {}).items()}
    given |= {f"guided_{key}": found.pop(f"guided_{key}", None) for key in _GUIDED}
    given = {key: value for key, value in given.items() if value not in _NOTHING}
    if not given:
        return found
    others = [key for key in (FIELD, "regex", "ebnf") if found.get(key)]
    if len(given) + len(others) > 1:
        raise BadRequest(f"{', '.join([*given, *others])}: expected one of them")
    ((field, value),) = given.items()
    return found | _translated(field, value)


def _translated(field: str, value: Any) -> dict[str, Any]:
    match re.split(r"\.|guided_", field)[-1]:
        case "json":
            return {FIELD: json_format(field, value)}
        case "json_object" if value is True:
            return {FIELD: {"type": "json_object"}}
        case "regex" if isinstance(value, str):
            return {"regex": value}
        case "grammar" if isinstance(value, str):
            return {"ebnf": value}
        case "choice":
            is_list = isinstance(value, list)
            if not is_list or not all(isinstance(one, str) and one for one in value):
                raise refused(field, value, "a list of at least 1 non-empty string")
            return {"regex": "|".join(map(re.escape, value))}
        case "regex" | "grammar":
            raise refused(field, value, "a string")
        case _:
            raise refused(field, value, f"nothing; {_OUTPUTS} has {', '.join(_GUIDED)}")


def json_format(field: str, schema: Any) -> dict[str, Any]:
    """``response_format`` of a schema, which is an object or its JSON.

    Raises:
        BadRequest: naming the field.
    """
    if isinstance(schema, str):
        with suppress(ValueError, RecursionError):
            schema = json.loads(schema)
    if not isinstance(schema, dict):
        raise refused(field, schema, "a JSON schema")
    inner = {"name": "answer", "schema": schema}
    return {"type": "json_schema", "json_schema": inner}


def with_form(body: dict[str, Any]) -> dict[str, Any]:
    """The body without a form that changes nothing.

    Raises:
        BadRequest: a form is wrong, or there are two.
    """
    form = body.get(FIELD)
    if form is not None and form.get("type") == "text":
        body = {key: value for key, value in body.items() if key != FIELD}
        form = None
    if form is not None:
        _check(form)
    given = given_forms(body)
    if len(given) > 1:
        raise BadRequest(f"{', '.join(given)}: expected one of them")
    return body


def given_forms(body: Mapping[str, Any]) -> list[str]:
    """The fields of an OpenAI body that ask for a form."""
    return [key for key in (FIELD, "regex", "ebnf") if body.get(key)]


def _check(form: dict[str, Any]) -> None:
    match form.get("type"):
        case "json_object" | "structural_tag":
            return
        case "json_schema":
            inner: Any = form.get("json_schema")
            is_object = isinstance(inner, dict)
            has_schema = is_object and isinstance(inner.get("schema"), dict)
            if has_schema and isinstance(inner.get("name", ""), str):
                return
            raise refused(
                f"{FIELD}.json_schema", inner, "an object with a name and a schema"
            )
        case other:
            raise refused(f"{FIELD}.type", other, _TYPES)


def forms_in(body: Any, *, has_parser: bool = False) -> list[tuple[str, Form]]:
    """The forms in a body of any route that passed its checks, by field.

    A forced tool call has the form of one of its tools. Their schemas are read one by
    one, and so are those of strict functions if the answer has no other form. A field
    that the route does not know was not checked, and may be anything.

    Args:
        has_parser: whether the server has a --tool-call-parser.
    """
    if not isinstance(body, dict):
        return []
    config = _object(body, "output_config")
    is_other = bool(given_forms(body) or config.get("format"))
    schemas = called_schemas(body, may_choose=has_parser and not is_other)
    found = [(field, _schema(schema)) for field, schema in schemas]
    given = _object(body, FIELD)
    if given.get("type") == "json_schema":
        schema = _object(given, "json_schema").get("schema")
        if schema is not None:
            found.append((f"{FIELD}.json_schema.schema", _schema(schema)))
    elif given.get("type") == "structural_tag":
        found.append((FIELD, Form("structural_tag", json.dumps(given))))
    for field in ("text", "output_config"):
        schema = _object(_object(body, field), "format").get("schema")
        if schema is not None:
            found.append((f"{field}.format.schema", _schema(schema)))
    found += _native("", body)
    params = body.get("sampling_params")
    if isinstance(params, list):
        for i, one in enumerate(params):
            found += _native(f"sampling_params[{i}].", one)
        return found
    return found + _native("sampling_params.", params)


def _object(body: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key)
    return value if isinstance(value, dict) else {}


def _native(prefix: str, params: Any) -> list[tuple[str, Form]]:
    if not isinstance(params, dict):
        return []
    return [
        (prefix + kind, native_form(kind, params[kind]))
        for kind in NATIVE
        if isinstance(params.get(kind), str) and params[kind]
    ]


def _schema(schema: Any) -> Form:
    # As SGLang writes it, so that the automaton is kept under one name.
    return native_form("json_schema", json.dumps(schema))


async def read_forms(forms: Iterable[tuple[str, Form]], named: str = "") -> None:
    """Read forms as the scheduler will, beside the event loop: it takes up to a second.

    The result is kept, so that a form that comes again costs nothing.

    Args:
        named: the client's name of the field, where it has another.

    Raises:
        BadRequest: a form is wrong or is not served; the error names the field.
    """
    # The answers of one request share a form.
    once = {form: field for field, form in forms}
    for form, field in once.items():
        try:
            await asyncio.to_thread(read_form, form)
        except FormError as error:
            raise BadRequest(f"{named or field} is not allowed: {error}") from None


def check_beside_form(
    params: Mapping[str, Any],
    length: str,
    edits: Mapping[str, Any],
    *,
    has_canvas: bool,
) -> None:
    """Refuse what could cut an answer of a given form, or forbid what it needs.

    Text that is free may be cut, and may go on.

    Args:
        params: the sampling parameters.
        length: the name of the request's length rule.
        edits: the fields that forbid tokens.
        has_canvas: the request gives a part of its answer.

    Raises:
        BadRequest: naming the field.
    """
    forms = [kind for kind in NATIVE if params.get(kind)]
    if not forms:
        return
    if len(forms) > 1:
        raise BadRequest(f"{', '.join(forms)}: expected one of them")
    given = {"ignore_eos": params.get("ignore_eos"), "dllm.canvas": has_canvas, **edits}
    tag = params.get("structural_tag") or ""
    if not has_free_text(tag):
        given |= {key: params.get(key) for key in ("stop", "stop_token_ids")}
    if not goes_on(tag):
        given |= {"min_tokens (min_new_tokens)": params.get("min_new_tokens")}
    for field, value in given.items():
        if value:
            raise BadRequest(f"{field} is not allowed beside a form of the answer")
    if length not in _LENGTHS:
        raise BadRequest(
            f"length={length!r} is not allowed beside a form of the answer; expected "
            f"one of {', '.join(_LENGTHS)}"
        )
