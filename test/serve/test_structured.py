"""Answers of a given form, through the server. Each is checked by another library."""

from __future__ import annotations

import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jsonschema
import pytest
import requests
from openai import BadRequestError, OpenAI
from pydantic import BaseModel

from helpers.serving_harness import Server

NUM_FORMS = 120
PROMPT = "Question: 2 + 3?\nAnswer:"


class Person(BaseModel):
    name: str
    age: int
    is_tall: bool


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    kinds = ["integer", "boolean", "null", "enum", "string", "const"]
    kind = rng.choice([*kinds, "object", "array"] if depth < 2 else kinds)
    if kind == "enum":
        return {"enum": rng.sample(["red", "green", 1, 2.5, None, True], 3)}
    if kind == "const":
        return {"const": rng.choice(["a b", 7, [1, "x"], {"k": False}])}
    if kind == "string":
        return {"type": "string", "maxLength": rng.randint(1, 6)}
    if kind == "array":
        items = random_schema(rng, depth + 1)
        return {"type": "array", "items": items, "minItems": 1, "maxItems": 2}
    if kind == "object":
        names = rng.sample(["id", "name", "ok", "size"], rng.randint(1, 3))
        return {
            "type": "object",
            "properties": {name: random_schema(rng, depth + 1) for name in names},
            "required": names,
            "additionalProperties": False,
        }
    return {"type": kind}


def random_regex(rng: random.Random, depth: int = 0) -> str:
    kind = rng.choice(
        ["text", "set", "repeat", "choice", "both"][: 2 + 3 * (depth < 3)]
    )
    if kind == "text":
        return rng.choice(["ab", "x", "7", "the ", r"\."])
    if kind == "set":
        return rng.choice(["[a-f]", r"\d", "[^a-z]", r"\w"])
    if kind == "repeat":
        least = rng.randint(0, 2)
        return f"({random_regex(rng, depth + 1)}){{{least},{least + 2}}}"
    left, right = random_regex(rng, depth + 1), random_regex(rng, depth + 1)
    return f"({left}|{right})" if kind == "choice" else left + right


def answer(server: Server, **params: Any) -> dict[str, Any]:
    sampling = {"max_new_tokens": 96, **params}
    reply = requests.post(
        f"{server.base_url}/generate",
        json={"text": PROMPT, "sampling_params": sampling},
        timeout=200,
    )
    found = reply.json()
    # SGLang's native route has an error in either place.
    message = found.get("error", found).get("message", "")
    return {"status": reply.status_code, "message": message, **found}


def test_random_forms_are_kept(demo_server: Server) -> None:
    """In concurrent batches, beside requests without a form."""
    rng = random.Random(5)
    plain = answer(demo_server)["text"]
    forms: list[dict[str, Any]] = []
    for i in range(NUM_FORMS):
        if i % 2:
            form = {"json_schema": json.dumps(random_schema(rng))}
        else:
            form = {"regex": random_regex(rng)}
        heat = {"temperature": 0.9, "sampling_seed": i} if i % 3 == 0 else {}
        forms.append({**form, **heat} if i % 15 else {})
    with ThreadPoolExecutor(16) as pool:
        replies = list(pool.map(lambda form: answer(demo_server, **form), forms))
    num_kept = 0
    for form, reply in zip(forms, replies, strict=True):
        if not form:
            assert reply["text"] == plain
        elif reply["status"] != 200:
            message = reply["message"]
            assert reply["status"] == 400, (form, message)
            assert "at least" in message, (form, message)
        elif "regex" in form:
            assert re.fullmatch(form["regex"], reply["text"]), (form, reply["text"])
            num_kept += 1
        else:
            value = json.loads(reply["text"])
            jsonschema.validate(value, json.loads(form["json_schema"]))
            num_kept += 1
    assert num_kept > 0.8 * NUM_FORMS


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
        ({"regex": "(a"}, "regex"),
        ({"json_schema": "{"}, "json"),
        ({"structural_tag": "{}x"}, "structural_tag"),
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
    reply = answer(demo_server, **params)
    assert reply["status"] == 400
    assert words in reply["message"]
