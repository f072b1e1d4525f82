"""The check of a body: it passes, or the refusal names field, value and range."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator
from typing import Annotated, Any, get_args, get_origin

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from helpers.bad_bodies import MALFORMED, ROUTES, SMALLEST, bad_bodies
from sglang_dllm.config.resolve import expected_of
from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.body import ServedModel, check_body
from sglang_dllm.serving.fields import (
    ChatFields,
    CompletionFields,
    GenerateFields,
    MessageFields,
    NativeSampling,
)
from sglang_dllm.serving.foreign_fields import MODIFIERS, NEUTRAL
from sglang_dllm.serving.forms import forms_in
from sglang_dllm.serving.raw_body import explain_malformed

MODEL = ServedModel(vocab_size=375, defaults={"temperature": 0.0})
TABLES: dict[str, type[BaseModel]] = {
    "chat": ChatFields,
    "completions": CompletionFields,
    "generate": GenerateFields,
}
PATHS = (
    *ROUTES.values(),
    *("/v1/messages", "/v1/responses", "/invocations", "/vertex_generate"),
    *("/detokenize", "/v1/detokenize", "/v1/embeddings"),
)

NUMBERS = st.one_of(st.integers(), st.sampled_from([0, 2**31, -(2**63), 2**63, 2**70]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.floats(), st.text(max_size=5))
EMPTY = st.sampled_from(["", {}, [], [{}], 0, 1, 1.0, -1, False, True])
VALUES = EMPTY | st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.text(max_size=5), inner, max_size=3),
    ),
    max_leaves=12,
)
NAMES = sorted(
    {
        *(key for table in TABLES.values() for key in table.model_fields),
        *NativeSampling.model_fields,
        *MessageFields.model_fields,
        *NEUTRAL,
        *MODIFIERS,
        *("custom_params", "dllm", "instances", "parameters", "tokens", "guided_json"),
        *(
            "min_p",
            "logit_bias",
            "response_format",
            "tool_choice",
            "lora_path",
            "regex",
        ),
    }
)
FIELDS = st.one_of(st.sampled_from(NAMES), st.text(max_size=5))
OBJECTS = st.dictionaries(FIELDS, VALUES, max_size=6)
PROMPTS = st.fixed_dictionaries({"text": st.sampled_from(["a", ""])})
BODIES = st.one_of(
    VALUES,
    OBJECTS,
    st.fixed_dictionaries({"messages": st.lists(OBJECTS, max_size=2)}),
    st.fixed_dictionaries(
        {"instances": st.lists(st.one_of(PROMPTS, OBJECTS), max_size=2)},
        optional={"parameters": OBJECTS},
    ),
)

many = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def refusal_of(path: str, body: Any) -> str | None:
    """The refusal of a body, None where it passes."""
    try:
        forms_in(check_body(path, body, MODEL), has_parser=True)
    except BadRequest as refusal:
        message = str(refusal)
        assert refusal.status_code == 400
        assert len(message.splitlines()) == 1, message
        message.encode()
        return message
    return None


KEYS_OF_FORMS = st.sampled_from(
    [
        *("type", "json_schema", "schema", "format", "function", "name", "parameters"),
        *("response_format", "text", "output_config", "sampling_params", "regex"),
        *("tools", "tool_choice", "input_schema", "ebnf", "structural_tag"),
    ]
)
FORMS = st.recursive(
    SCALARS
    | KEYS_OF_FORMS
    | st.sampled_from(["required", {"type": "json_schema"}, {"type": "any"}]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(KEYS_OF_FORMS, inner, max_size=4),
    ),
    max_leaves=10,
)


@many
@given(FORMS)
def test_forms_are_looked_for_in_any_body(body: Any) -> None:
    """A route passes on fields that it does not know, whatever they hold."""
    for field, form in forms_in(body, has_parser=True):
        assert field
        assert form


@many
@given(st.sampled_from(PATHS), BODIES)
def test_any_body_passes_or_is_refused(path: str, body: Any) -> None:
    before = copy.deepcopy(body)
    refusal_of(path, body)
    assert repr(body) == repr(before), "the client's body is not written to"


@many
@given(st.sampled_from(list(ROUTES)), st.dictionaries(FIELDS, VALUES, max_size=3))
def test_a_good_body_with_other_fields(route: str, change: dict[str, Any]) -> None:
    refusal_of(ROUTES[route], {**SMALLEST[route], **change})
    if route == "generate":
        params = {"sampling_params": change}
        refusal_of(ROUTES[route], {**SMALLEST[route], **params})


@many
@given(st.data())
def test_a_known_field_is_named_with_its_range(data: st.DataObject) -> None:
    """Whatever value it has: the field that is changed is the one that is named."""
    route = data.draw(st.sampled_from(list(ROUTES)))
    key = data.draw(st.sampled_from(sorted(TABLES[route].model_fields)))
    body = {**SMALLEST[route], key: data.draw(VALUES)}
    if key == "input_ids" and route == "generate":
        del body["text"]
    message = refusal_of(ROUTES[route], body)
    if message is not None:
        # A body with neither or both of the two prompts names them both, and a wrong
        # message or sampling parameter is named by its own name.
        inner = ("messages[", "sampling_params", "text, input_ids", "chat_template_")
        assert message.startswith((key, *inner)), message
        assert "expected" in message or "is missing" in message


@many
@given(st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=3))
def test_sglang_takes_what_passes(params: dict[str, Any]) -> None:
    """A value that is no number once reached SGLang's comparison with one."""
    from sglang.srt.sampling.sampling_params import SamplingParams

    body = {"text": "a", "sampling_params": params}
    if refusal_of("/generate", body) is None:
        found = check_body("/generate", body, MODEL)["sampling_params"]
        made = SamplingParams(**found)
        made.verify(MODEL.vocab_size)
        for key in NEUTRAL.keys() & set(SamplingParams.__struct_fields__):
            if key not in NativeSampling.model_fields:
                assert getattr(made, key) == getattr(SamplingParams(), key)


def plain_fields(table: type[BaseModel]) -> Iterator[tuple[str, FieldInfo, type]]:
    """The fields that are one number, string or truth value, with its type."""
    for key, field in table.model_fields.items():
        for option in (field.annotation, *get_args(field.annotation)):
            kind = get_args(option)[0] if get_origin(option) is Annotated else option
            if kind in (int, float, bool, str):
                yield key, field, kind
                break


def bounds_of(field: FieldInfo) -> tuple[float | None, float | None]:
    """The smallest and the largest number that a field may have."""
    found = list(field.metadata)
    for option in get_args(field.annotation):
        for info in getattr(option, "__metadata__", ()):
            found += getattr(info, "metadata", [])
    limits = {
        name: getattr(one, name)
        for one in found
        for name in ("ge", "gt", "le", "lt")
        if getattr(one, name, None) is not None
    }
    return limits.get("ge", limits.get("gt")), limits.get("le", limits.get("lt"))


WRONG: dict[type, tuple[Any, ...]] = {
    int: (True, "1", 1.5, [1], {"a": 1}, [], math.inf, math.nan),
    float: (True, "1", [1.0], {}, math.inf, math.nan, 10**400),
    bool: (0, 1, "true", [], {}, 0.5),
    str: (0, True, 1.5, [["a"]], {"a": "b"}),
}

PLAIN = [
    pytest.param(table, key, field, kind, id=f"{table.__name__}-{key}")
    for table in (*TABLES.values(), NativeSampling)
    for key, field, kind in plain_fields(table)
]


@pytest.mark.parametrize(("table", "key", "field", "kind"), PLAIN)
def test_a_wrong_type_or_range_has_the_documented_text(
    table: type[BaseModel], key: str, field: FieldInfo, kind: type
) -> None:
    wrong = list(WRONG[kind])
    low, high = bounds_of(field)
    if low is not None:
        wrong += [low - 1, -(10**30)]
    if high is not None:
        wrong += [high + 1, 10**30]
    route = {NativeSampling: "generate"} | {t: r for r, t in TABLES.items()}
    for value in wrong:
        prefix, body = "", {**SMALLEST[route[table]], key: value}
        if table is NativeSampling:
            prefix = "sampling_params."
            body = {"text": "a", "sampling_params": {key: value}}
        message = refusal_of(ROUTES[route[table]], body)
        assert message is not None, (key, value)
        shown = ascii(value)
        shown = shown if len(shown) <= 80 else shown[:77] + "..."
        expected = expected_of(table, key)
        assert message == f"{prefix}{key}={shown} is not allowed; expected {expected}"


def test_every_plain_field_is_found() -> None:
    found = {f"{p.values[0].__name__}.{p.values[1]}" for p in PLAIN}
    for name in ("ChatFields.top_p", "NativeSampling.sampling_seed"):
        assert name in found
    assert len(found) > 60


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("route", ROUTES)
def test_a_wrong_field_is_named(route: str, stream: bool) -> None:
    for its_route, field, body in bad_bodies():
        if its_route == route:
            stream = stream or field == "stream_options"
            message = refusal_of(ROUTES[route], {**body, "stream": stream})
            assert message is not None and field in message, (body, message)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("bad", ["yes", 1, [], {}])
def test_stream_is_a_boolean(route: str, bad: Any) -> None:
    message = refusal_of(ROUTES[route], {**SMALLEST[route], "stream": bad})
    assert message == f"stream={bad!r} is not allowed; expected true or false"


@many
@given(st.one_of(st.binary(max_size=30), st.text(max_size=30).map(str.encode), VALUES))
def test_what_no_parser_takes_is_explained(raw: Any) -> None:
    if not isinstance(raw, bytes):
        raw = json.dumps({"a": raw}).encode()
    message = str(explain_malformed(raw, "why"))
    message.encode()
    assert "expected" in message or message == "body: malformed JSON, why"


@pytest.mark.parametrize(("route", "field", "raw"), MALFORMED)
def test_malformed_json_is_located(route: str, field: str, raw: str) -> None:
    try:
        body = json.loads(raw, parse_constant=lambda name: 1 / 0)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
    except (ValueError, ZeroDivisionError, RecursionError):
        assert field in str(explain_malformed(raw.encode(), "why"))
    else:
        message = refusal_of(ROUTES[route], body)
        # The server's parser is stricter about depth than Python's.
        assert message is not None and field in message
