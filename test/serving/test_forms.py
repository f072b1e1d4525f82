"""The fields that ask for a form of the answer, of every client, without a server."""

from __future__ import annotations

import asyncio
import re
from types import SimpleNamespace
from typing import Any

import pytest

from sglang_dllm.grammar.forms import Form, read_form
from sglang_dllm.serving.bad_request import BadRequest
from sglang_dllm.serving.forms import (
    FIELD,
    check_beside_form,
    forms_in,
    read_forms,
    with_own_form,
)
from sglang_dllm.serving.tool_calls import check_choice, form_of_calls

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}
AS_TEXT = '{"type": "object", "properties": {"a": {"type": "integer"}}}'
TOOLS = [
    {"type": "function", "function": {"name": "add", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "stop"}},
]
ADD = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize("schema", [SCHEMA, AS_TEXT])
@pytest.mark.parametrize("field", ["guided_json", "structured_outputs"])
def test_vllms_schema_is_a_response_format(field: str, schema: Any) -> None:
    value = schema if field == "guided_json" else {"json": schema, "regex": None}
    found = with_own_form({"model": "a", field: value, "guided_regex": None})
    assert found.pop("model") == "a" and list(found) == [FIELD]
    assert forms_in(found) == [
        (f"{FIELD}.json_schema.schema", Form("json_schema", AS_TEXT))
    ]


def test_vllms_other_fields_have_their_own_names() -> None:
    for field in ("guided_", "structured_outputs."):

        def body(key: str, value: Any, field: str = field) -> dict[str, Any]:
            if field == "guided_":
                return {f"guided_{key}": value}
            return {"structured_outputs": {key: value}}

        assert with_own_form(body("regex", "a+")) == {"regex": "a+"}
        assert with_own_form(body("grammar", "root ::= x")) == {"ebnf": "root ::= x"}
        words = ["a.b", "c|d", "(e"]
        pattern = with_own_form(body("choice", words))["regex"]
        assert all(re.fullmatch(pattern, word) for word in words)
        read_form(Form("regex", pattern))
        assert not re.fullmatch(pattern, "axb")
    found = with_own_form({"structured_outputs": {"json_object": True}})
    assert found == {FIELD: {"type": "json_object"}}
    assert with_own_form({"guided_choice": [], "structured_outputs": {}}) == {}


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"guided_json": 5}, "guided_json=5"),
        ({"guided_json": "{"}, "guided_json="),
        ({"guided_regex": 5}, "guided_regex=5"),
        ({"guided_choice": ["a", ""]}, "guided_choice="),
        ({"structured_outputs": "a"}, "structured_outputs="),
        ({"structured_outputs": {"whitespace_pattern": "a"}}, "whitespace_pattern"),
        ({"structured_outputs": {"choice": "a"}}, r"structured_outputs\.choice="),
        ({"guided_regex": "a", "ebnf": "b"}, "guided_regex, ebnf: expected one"),
        ({"guided_json": {"a": 1}, "guided_regex": "a"}, "expected one of them"),
    ],
)
def test_a_wrong_field_of_vllm_is_named(body: dict[str, Any], words: str) -> None:
    with pytest.raises(BadRequest, match=words):
        with_own_form(body)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"regex": "(a"}, "regex"),
        ({"ebnf": "root ::= ["}, "ebnf"),
        ({"sampling_params": {"json_schema": "{"}}, "sampling_params.json_schema"),
        ({"sampling_params": [{}, {"regex": "["}]}, r"sampling_params\[1\].regex"),
        ({FIELD: {"type": "json_schema", "json_schema": {"schema": {"not": {}}}}},
         r"response_format.json_schema.schema .*not alone"),
        ({FIELD: {"type": "structural_tag"}}, "response_format"),
        ({"text": {"format": {"schema": {"if": {}}}}}, "text.format.schema .*if"),
        ({"output_config": {"format": {"schema": {"type": 5}}}}, "output_config"),
        ({"tools": [{"name": "f", "input_schema": {"type": "x"}}],
          "tool_choice": {"type": "any"}}, r"tools\[0\].input_schema"),
        ({"tools": [{"function": {"name": "f", "parameters": {"type": "x"}}}],
          "tool_choice": "required"}, r"tools\[0\].function.parameters"),
    ],
)  # fmt: skip
def test_a_form_that_is_not_served_is_named(body: dict[str, Any], field: str) -> None:
    with pytest.raises(BadRequest, match=f"^{field}"):
        asyncio.run(read_forms(forms_in(body)))
    with pytest.raises(BadRequest, match=r"^format is not allowed"):
        asyncio.run(read_forms(forms_in(body), named="format"))


@pytest.mark.parametrize(
    "body",
    [
        "text",
        {"text": "a", "sampling_params": {}},
        {"text": {"format": {"type": "json_object"}}, "output_config": "x"},
        {"tools": 5, "tool_choice": {"type": "x", "function": "y"}},
        {"tools": [{"function": {"parameters": {"type": "x"}}}], "tool_choice": "auto"},
        {"regex": 5, "sampling_params": {"regex": ""}},
    ],
)
def test_other_bodies_have_no_forms(body: Any) -> None:
    assert forms_in(body) == []


def test_strict_functions_are_read_where_they_count() -> None:
    strict = {"function": {"name": "f", "parameters": {"type": "x"}, "strict": True}}
    body = {"tools": [*TOOLS, strict], "tool_choice": "auto"}
    ((field, _),) = forms_in(body, has_parser=True)
    assert field == "tools[2].function.parameters"
    anthropic = {"name": "f", "input_schema": {"type": "x"}, "strict": True}
    ((field, _),) = forms_in({"tools": [anthropic]}, has_parser=True)
    assert field == "tools[0].input_schema"
    assert forms_in(body) == []
    for choice in ("none", {"type": "none"}):
        assert forms_in({**body, "tool_choice": choice}, has_parser=True) == []
    # The answer has the other form, and no call.
    ((field, _),) = forms_in({**body, "regex": "a"}, has_parser=True)
    assert field == "regex"


def test_the_named_function_alone_is_read() -> None:
    body = {"tools": [*TOOLS, {"function": {"name": "x", "parameters": {"not": 1}}}]}
    (found,) = forms_in({**body, "tool_choice": ADD})
    assert found == ("tools[0].function.parameters", Form("json_schema", AS_TEXT))


@pytest.mark.parametrize(
    ("params", "length", "words"),
    [
        ({"stop": ["a"]}, "fixed", "stop"),
        ({"stop_token_ids": [1]}, "fixed", "stop_token_ids"),
        ({"ignore_eos": True}, "fixed", "ignore_eos"),
        ({"min_new_tokens": 2}, "fixed", "min_tokens"),
        ({"ebnf": "b"}, "fixed", "regex, ebnf"),
        ({}, "daedal", "length='daedal'"),
    ],
)
def test_what_does_not_go_together_with_a_form(
    params: dict[str, Any], length: str, words: str
) -> None:
    check_beside_form(params | {"ebnf": None}, length, {}, has_canvas=True)
    with pytest.raises(BadRequest, match=words):
        check_beside_form({"regex": "a", **params}, length, {}, has_canvas=False)


def test_fields_that_forbid_tokens_do_not_go_together_with_a_form() -> None:
    given: dict[str, Any] = {"json_schema": "{}", "stop": [], "min_new_tokens": 0}
    check_beside_form(given, "append", {}, has_canvas=False)
    with pytest.raises(BadRequest, match="bad_words"):
        check_beside_form(given, "fixed", {"bad_words": [[1]]}, has_canvas=False)
    with pytest.raises(BadRequest, match="canvas"):
        check_beside_form(given, "fixed", {}, has_canvas=True)


@pytest.mark.parametrize(
    ("body", "has_parser", "words"),
    [
        ({"tool_choice": "required"}, True, "tools"),
        ({"tool_choice": "required", "tools": TOOLS}, False, "--tool-call-parser"),
        ({"tool_choice": {"type": "any"}, "tools": TOOLS}, False, "--tool-call-parser"),
        ({"tool_choice": {"type": "function"}, "tools": TOOLS}, True, "required or"),
        ({"tool_choice": {"type": "x", "function": {"name": "add"}}}, True, "required"),
        ({"tool_choice": ADD, "tools": TOOLS, "regex": "a"}, True, "regex"),
    ],
)
def test_a_choice_that_is_not_served_is_named(
    body: dict[str, Any], has_parser: bool, words: str
) -> None:
    forms = [key for key in ("regex",) if key in body]
    with pytest.raises(BadRequest, match=f"tool_choice.*{words}"):
        check_choice(body, forms, has_parser=has_parser)


def test_a_choice_without_force_is_none_of_ours() -> None:
    for choice in (None, "auto", "none", {"type": "auto"}, {"type": "none"}):
        check_choice({"tool_choice": choice}, ["regex"], has_parser=False)


def functions(**strict: bool) -> list[Any]:
    return [
        SimpleNamespace(
            function=SimpleNamespace(
                name=name, parameters=parameters, strict=strict.get(name, False)
            )
        )
        for name, parameters in (("add", SCHEMA), ("stop", None))
    ]


def test_a_forced_call_is_one_structure_for_each_function() -> None:
    kind, tag = form_of_calls("qwen25", functions(), "required")
    assert kind == "structural_tag"
    assert tag.format.at_least_one and tag.format.stop_after_first
    first, second = tag.format.tags
    assert "add" in first.begin and "stop" in second.begin
    assert first.content.json_schema == SCHEMA
    read_form(Form("structural_tag", tag.model_dump_json(by_alias=True)))
    named = SimpleNamespace(function=SimpleNamespace(name="stop"))
    _, tag = form_of_calls("hermes", functions(), named)
    (only,) = tag.format.tags
    assert "stop" in only.begin
    assert only.content.json_schema["additionalProperties"] is False
    for parser in ("pythonic", "qwen3_coder", "glm45"):
        with pytest.raises(BadRequest, match=f"--tool-call-parser {parser}"):
            form_of_calls(parser, functions(), "required")


def test_calls_of_strict_functions_have_text_around_them() -> None:
    """Arguments of another function are any object, as for SGLang."""
    _, tag = form_of_calls("qwen25", functions(add=True), "auto")
    assert not tag.format.at_least_one and not tag.format.stop_after_first
    assert tag.format.triggers == ["<tool_call>"]
    first, second = tag.format.tags
    assert first.content.json_schema == SCHEMA
    assert second.content.json_schema == {"type": "object"}
    text = tag.model_dump_json(by_alias=True)
    read_form(Form("structural_tag", text))
    params = {"stop": ["a"], "stop_token_ids": [1], "min_new_tokens": 2}
    given = {"structural_tag": text, **params}
    check_beside_form(given, "fixed", {}, has_canvas=False)
    for change in ({"ignore_eos": True}, {"regex": "a"}):
        with pytest.raises(BadRequest, match=next(iter(change))):
            check_beside_form({**given, **change}, "fixed", {}, has_canvas=False)
    _, tag = form_of_calls("hermes", functions(add=True), "auto", is_parallel=False)
    assert tag.format.stop_after_first and not tag.format.at_least_one
    with pytest.raises(BadRequest, match="min_tokens"):
        given["structural_tag"] = tag.model_dump_json(by_alias=True)
        check_beside_form(given, "fixed", {}, has_canvas=False)
    given["min_new_tokens"] = 0
    check_beside_form(given, "fixed", {}, has_canvas=False)
    # llama3 takes JSON for a call, wherever it comes from.
    for parser in ("llama3", "pythonic", "qwen3_coder", "glm45"):
        with pytest.raises(BadRequest, match=rf"tools\[1\].*parser {parser}"):
            form_of_calls(parser, functions(stop=True), "auto")
    form_of_calls("llama3", functions(), "required")
