"""Answers of a given form, through the server. Each is checked by another library."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import requests
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from helpers.serving_harness import Server
from sglang_dllm.serving.forms import json_format

PROMPT = "Question: 2 + 3?\nAnswer:"


class Person(BaseModel):
    name: str
    age: int
    is_tall: bool


LEAVES = st.one_of(
    st.sampled_from(["integer", "boolean", "null"]).map(lambda kind: {"type": kind}),
    st.permutations(["red", "green", 1, 2.5, None, True]).map(
        lambda values: {"enum": values[:3]}
    ),
    st.sampled_from(["a b", 7, [1, "x"], {"k": False}]).map(lambda v: {"const": v}),
    st.integers(1, 6).map(lambda most: {"type": "string", "maxLength": most}),
)
SCHEMAS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        inner.map(
            lambda items: {
                **{"type": "array", "items": items},
                **{"minItems": 1, "maxItems": 2},
            }
        ),
        st.dictionaries(
            st.sampled_from(["id", "name", "ok", "size"]), inner, min_size=1, max_size=3
        ).map(
            lambda properties: {
                **{"type": "object", "properties": properties},
                **{"required": [*properties], "additionalProperties": False},
            }
        ),
    ),
    max_leaves=4,
)
EXPRESSIONS = st.recursive(
    st.sampled_from(["ab", "x", "7", "the ", r"\.", "[a-f]", r"\d", "[^a-z]", r"\w"]),
    lambda inner: st.one_of(
        st.builds("({}|{})".format, inner, inner),
        st.builds("{}{}".format, inner, inner),
        st.builds(
            lambda part, least: f"({part}){{{least},{least + 2}}}",
            *(inner, st.integers(0, 2)),
        ),
    ),
    max_leaves=5,
)
FORMS = st.one_of(
    SCHEMAS.map(lambda schema: {"json_schema": json.dumps(schema)}),
    EXPRESSIONS.map(lambda pattern: {"regex": pattern}),
)


def answer(server: Server, is_streamed: bool = False, **params: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": 96, **params}
    reply = requests.post(
        f"{server.base_url}/generate",
        json={"text": PROMPT, "sampling_params": sampling, "stream": is_streamed},
        timeout=200,
    )
    found = reply.json()
    # SGLang's native route has an error in either place.
    message = found.get("error", found).get("message", "")
    return {"status": reply.status_code, "message": message, **found}


@settings(
    max_examples=5,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(forms=st.lists(FORMS, min_size=60, max_size=60, unique_by=repr))
def test_random_forms_are_kept(
    demo_server: Server, forms: list[dict[str, Any]]
) -> None:
    """300 in concurrent batches, beside requests without a form."""

    def ask(number: int) -> dict[str, Any]:
        heat = {"temperature": 0.9, "sampling_seed": number} if number % 3 == 0 else {}
        return answer(demo_server, max_new_tokens=64, **forms[number], **heat)

    plain = answer(demo_server)["text"]
    with ThreadPoolExecutor(16) as pool:
        others = [pool.submit(answer, demo_server) for _ in range(4)]
        replies = list(pool.map(ask, range(len(forms))))
    assert {other.result()["text"] for other in others} == {plain}
    num_kept = 0
    for form, reply in zip(forms, replies, strict=True):
        if reply["status"] != 200:
            assert reply["status"] == 400, (form, reply["message"])
            assert "at least" in reply["message"], (form, reply["message"])
            continue
        num_kept += 1
        if "regex" in form:
            assert re.fullmatch(form["regex"], reply["text"]), (form, reply["text"])
        else:
            schema = json.loads(form["json_schema"])
            jsonschema.validate(json.loads(reply["text"]), schema)
    assert num_kept > 0.8 * len(forms)


PAIR = {
    "type": "object",
    "properties": {"x": {"type": "integer"}, "ok": {"type": "boolean"}},
    "required": ["x", "ok"],
    "additionalProperties": False,
}
EBNF = 'root ::= "(" [0-9]{1,6} ")" | "none"'
FIVE = 20
CALLS = {
    "type": "structural_tag",
    "structures": [{"begin": "5[", "schema": {"type": "boolean"}, "end": "]"}],
    "triggers": ["5"],
}
NEWER_CALLS = {
    "type": "structural_tag",
    "format": {
        **{"type": "triggered_tags", "triggers": ["5"], "stop_after_first": True},
        "tags": [
            {
                **{"type": "tag", "begin": "5[", "end": "]"},
                "content": {"type": "regex", "pattern": "a|b"},
            }
        ],
    },
}
ASKS_FOR_FIVES = {"logit_bias": {str(FIVE): 100}}
OPTIONS: dict[str, dict[str, Any]] = {
    "append": {"length": "append"},
    "append by blocks": {"length": "append", "append_blocks": 2, "block_size": 8},
    "guided": {"algorithm": "LLaDA", "cfg_scale": 1.5, "steps": 24},
    "guided append": {"algorithm": "LLaDA", "cfg_scale": 1, "length": "append"},
    "prefix cache": {"cache": "prefix", "block_size": 16},
    "dual cache": {"cache": "dual", "block_size": 16},
    "few forwards": {"max_forwards": 3},
}


def test_forms_together_with_the_rest(demo_server: Server) -> None:
    """Options of the decoding, streams and routes, all in one crowd."""
    chat: dict[str, Any] = {
        **{"model": "demo", "messages": [{"role": "user", "content": "Ann?"}]},
        **{"max_tokens": 48, "response_format": json_format("format", PAIR)},
    }
    completion: dict[str, Any] = {"model": "demo", "prompt": PROMPT, "max_tokens": 32}

    def by_option(dllm: dict[str, Any]) -> str:
        params = {"max_new_tokens": 48, "json_schema": json.dumps(PAIR)}
        reply = answer(demo_server, **params, custom_params={"dllm": dllm})
        assert reply["status"] == 200, (dllm, reply["message"])
        return str(reply["text"])

    def streamed_chat() -> str:
        parts = demo_server.events("/v1/chat/completions", **chat)
        choices = [one for part in parts for one in part["choices"]]
        return "".join(one["delta"].get("content") or "" for one in choices)

    def whole_chat() -> str:
        reply = demo_server.post("/v1/chat/completions", **chat).json()
        return str(reply["choices"][0]["message"]["content"])

    def streamed(**form: Any) -> str:
        parts = demo_server.events("/v1/completions", **completion, **form)
        return "".join(one["text"] for part in parts for one in part["choices"])

    def whole(**form: Any) -> str:
        reply = demo_server.post("/v1/completions", **completion, **form).json()
        return str(reply["choices"][0]["text"])

    patterns: list[tuple[dict[str, Any], str]] = [
        ({"ebnf": EBNF}, r"\([0-9]{1,6}\)|none"),
        ({"guided_grammar": EBNF}, r"\([0-9]{1,6}\)|none"),
        ({"regex": "[ab]{3,9}"}, "[ab]{3,9}"),
        ({"guided_choice": ["no.", "y|es"]}, r"no\.|y\|es"),
        ({"structured_outputs": {"regex": "x+y"}}, "x+y"),
        ({"response_format": CALLS}, r"([^5]|5\[(true|false)\])*"),
        (
            {"response_format": CALLS, **ASKS_FOR_FIVES},
            r"([^5]*5\[(true|false)\])+[^5]*",
        ),
        (
            {"response_format": NEWER_CALLS, **ASKS_FOR_FIVES},
            r"[^5]*5\[(a|b)\]",
        ),
    ]
    with ThreadPoolExecutor(16) as pool:
        texts = {name: pool.submit(by_option, OPTIONS[name]) for name in OPTIONS}
        texts["chat"] = pool.submit(whole_chat)
        texts["a stream of chat"] = pool.submit(streamed_chat)
        expressions = [
            (pool.submit(ask, **form), pattern)
            for form, pattern in patterns
            for ask in (whole, streamed)
        ]
    for name, text in texts.items():
        value = json.loads(text.result())
        jsonschema.validate(value, PAIR)
        assert list(value) == ["x", "ok"], name
    for text, pattern in expressions:
        assert re.fullmatch(pattern, text.result()), (pattern, text.result())
    # Alone: the rounding of a crowd may decide between digits that are as likely.
    assert whole_chat() == streamed_chat()
    for form, _ in patterns:
        assert whole(**form) == streamed(**form), "a stream has the same text"


def test_a_stock_client_parses_answers(demo_server: Server) -> None:
    with OpenAI(base_url=f"{demo_server.base_url}/v1", api_key="none") as client:
        messages: list[Any] = [{"role": "user", "content": "Who is Ann?"}]
        found = client.chat.completions.parse(
            model="demo", messages=messages, response_format=Person, max_tokens=96
        )
        assert isinstance(found.choices[0].message.parsed, Person)
        assert found.choices[0].finish_reason == "stop"
        plain = client.chat.completions.create(
            model="demo",
            messages=messages,
            response_format={"type": "json_object"},
            max_tokens=64,
        )
        assert isinstance(json.loads(plain.choices[0].message.content or ""), dict)
        with pytest.raises(BadRequestError, match="at least"):
            client.chat.completions.parse(
                model="demo", messages=messages, response_format=Person, max_tokens=4
            )


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ({"regex": "a+", "stop": ["a"]}, "stop"),
        ({"regex": "a+", "ignore_eos": True}, "ignore_eos"),
        ({"regex": "(a"}, "sampling_params.regex"),
        ({"json_schema": "{"}, "sampling_params.json_schema"),
        ({"ebnf": "root ::= ["}, "sampling_params.ebnf"),
        ({"structural_tag": "{}x"}, "structural_tag"),
        ({"regex": "a", "custom_params": {"dllm": {"length": "daedal"}}}, "length"),
        ({"guided_json": "{}x"}, "json_schema"),
        (
            {
                "regex": "a+",
                "custom_params": {"dllm": {"canvas": ["a", {"mask": 4}]}},
            },
            "canvas",
        ),
    ],
    ids=str,
)
def test_forms_that_are_refused(
    demo_server: Server, params: dict[str, Any], words: str
) -> None:
    """Before a stream begins, too."""
    for is_streamed in (False, True):
        reply = answer(demo_server, is_streamed, **params)
        assert reply["status"] == 400
        assert words in reply["message"]


SCHEMA = {"type": "string", "if": {"maxLength": 2}}
WRONG: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": "a"}],
        "response_format": json_format("", SCHEMA),
    },
    "/v1/completions": {"prompt": "a", "guided_json": SCHEMA},
    "/v1/responses": {
        "input": "a",
        "text": {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}},
    },
    "/api/chat": {"messages": [{"role": "user", "content": "a"}], "format": SCHEMA},
    "/api/generate": {"prompt": "a", "format": SCHEMA},
}


@pytest.mark.parametrize("path", WRONG)
def test_a_wrong_form_is_refused_at_the_door(demo_server: Server, path: str) -> None:
    for is_streamed in (False, True):
        body = {"model": "demo", **WRONG[path], "stream": is_streamed}
        refused = demo_server.post(path, **body)
        assert refused.status_code == 400
        assert "is not allowed" in refused.text and "#/if" in refused.text


def test_other_clients_ask_for_forms(demo_server: Server) -> None:
    """``responses.parse`` of openai, and Ollama's format, equal to chat's answer."""
    url, length = demo_server.base_url, 64
    messages = [{"role": "user", "content": "Who is Ann?"}]
    schema = Person.model_json_schema()
    chat: Any = {"model": "demo", "messages": messages, "max_tokens": length}

    def chat_text(form: Any) -> str:
        found = demo_server.post("/v1/chat/completions", **chat, response_format=form)
        return str(found.json()["choices"][0]["message"]["content"])

    expected = chat_text(json_format("", schema))
    Person.model_validate_json(expected)
    with OpenAI(base_url=f"{url}/v1", api_key="none") as client:
        found = client.responses.parse(
            **{"model": "demo", "input": messages, "max_output_tokens": length},
            text_format=Person,
        )
        assert isinstance(found.output_parsed, Person)
        assert found.text is not None and found.text.format is not None
        assert found.text.format.type == "json_schema"
        events: Any = client.responses.create(
            **{"model": "demo", "input": messages, "max_output_tokens": length},
            text={"format": {"type": "json_object"}},
            stream=True,
        )
        parts = [e.delta for e in events if e.type == "response.output_text.delta"]
        assert "".join(parts) == chat_text({"type": "json_object"})
    options = {"num_predict": length}
    asked = {"model": "demo", "messages": messages, "stream": False, "options": options}
    whole = demo_server.post("/api/chat", **asked, format=schema).json()
    assert whole["message"]["content"] == expected
    streamed = demo_server.post(
        "/api/generate",
        **{"model": "demo", "prompt": "Who is Ann?", "options": options},
        format="json",
    )
    lines = [json.loads(line) for line in streamed.text.splitlines()]
    text = "".join(line["response"] for line in lines)
    assert text == chat_text({"type": "json_object"})
