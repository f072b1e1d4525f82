"""Forms become automata: all that these accept is valid; what is refused is named."""

from __future__ import annotations

import json
import random
import re
from datetime import timedelta
from typing import Any

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sglang_dllm.decoding.structure.automaton import NEVER, TokenAutomaton
from sglang_dllm.demo import demo_path
from sglang_dllm.grammar.byte_automaton import MAX_DEPTH
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.forms import Form, compile_form, read_form, vocabulary_of
from sglang_dllm.grammar.token_automaton import Vocabulary
from sglang_dllm.grammar.utf8 import byte_ranges

LETTERS = Vocabulary([bytes([byte]) for byte in range(256)] + [None], [256], 257)
"""A token for each byte, and an EOS."""

brief = settings(max_examples=25, deadline=timedelta(seconds=20))


def schema(found: Any) -> Form:
    return Form("json_schema", json.dumps(found))


def walk(automaton: TokenAutomaton, seed: int, most: int = 40) -> list[int]:
    """The tokens of a random valid answer of about ``most`` tokens."""
    rng, state, out = random.Random(seed), automaton.start, []
    first = {
        number: np.flatnonzero(automaton.token_class == number)
        for number in range(automaton.num_classes)
    }
    while True:
        at = np.flatnonzero(automaton.edge_source == state)
        at = at[automaton.edge_target[at] != automaton.end]
        may_end = automaton.accepting[state]
        if may_end and (not len(at) or len(out) > most or rng.random() < 0.1):
            return out
        if len(out) > most:
            near = automaton.distance[automaton.edge_target[at]]
            at = at[near < automaton.distance[state]]
        edge = rng.choice(list(at))
        out.append(int(rng.choice(list(first[int(automaton.edge_class[edge])]))))
        state = int(automaton.edge_target[edge])


def texts(form: Form, num: int = 20) -> list[str]:
    automaton = compile_form(form, LETTERS)
    return [bytes(walk(automaton, seed)).decode() for seed in range(num)]


PAIR = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
SCHEMAS: dict[str, Any] = {
    "string": {"type": "string", "minLength": 2, "maxLength": 4},
    "pattern": {"type": "string", "pattern": "^[^a-m]{1,3}\\d?$"},
    "date": {"type": "string", "format": "date"},
    "date-time": {"type": "string", "format": "date-time"},
    "email": {"type": "string", "format": "email"},
    "ipv4": {"type": "string", "format": "ipv4"},
    "integer": {"type": "integer", "minimum": -3, "exclusiveMaximum": 120},
    "multiple": {"type": "integer", "multipleOf": 3},
    "equal paths": {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"b": PAIR}, "required": ["b"]},
            "a/properties/b": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}},
                "required": ["x"],
            },
        },
        "required": ["a", "a/properties/b"],
    },
    "number": {"type": "number", "minimum": 1.5, "maximum": 3.25},
    "free number": {"type": "number"},
    "enum": {"enum": ["a", 1, None, {"x": [True]}]},
    "enum of a type": {"type": "string", "enum": ["a", 3]},
    "array": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
    "tuple": {"type": "array", "prefixItems": [{"const": 1}, {"type": "null"}]},
    "object": {
        "type": "object",
        "properties": {
            "a": {"type": "integer"},
            "é \"": {"type": "boolean"},
            "c": {"const": "x"},
        },
        "required": ["é \""],
        "additionalProperties": False,
    },
    "map": {"type": "object", "additionalProperties": {"type": "integer"}},
    "anyOf": {"anyOf": [{"type": "integer"}, {"type": "string", "maxLength": 1}]},
    "oneOf": {
        "oneOf": [
            {
                "type": "object",
                "properties": {"kind": {"const": kind}},
                "required": ["kind"],
            }
            for kind in ("x", "y")
        ]
    },
    "types": {"type": ["string", "null"], "maxLength": 2},
    "reference": {
        "$ref": "#/$defs/node",
        "$defs": {
            "node": {
                "type": "object",
                "properties": {
                    "next": {"$ref": "#/$defs/node"},
                    "value": {"type": "integer"},
                },
                "required": ["value"],
            }
        },
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SCHEMAS)
def test_each_answer_satisfies_its_schema(name: str) -> None:
    checker = jsonschema.FormatChecker()
    for text in texts(schema(SCHEMAS[name])):
        jsonschema.validate(json.loads(text), SCHEMAS[name], format_checker=checker)


REFUSED: dict[str, Any] = {
    "not": {"type": "integer", "not": {"const": 1}},
    "if": {"type": "integer", "if": {"minimum": 3}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": {"const": 1}},
    "dependentRequired": {"type": "object", "dependentRequired": {"a": ["b"]}},
    "patternProperties": {"type": "object", "patternProperties": {"a": {}}},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 1}},
    "minProperties": {"type": "object", "minProperties": 1},
    "oneOf": {"oneOf": [{"type": "integer"}, {"type": "number"}]},
    "allOf": {"allOf": [{"type": "integer"}, {"minimum": 1}]},
    "minimum beside $ref": {"$ref": "#/$defs/a", "minimum": 1, "$defs": {"a": {}}},
    "pattern": {"type": "string", "pattern": "a", "maxLength": 1},
    "at_boundary": {"type": "string", "pattern": "a\\b"},
    "format": {"type": "string", "format": "iri"},
    "required names": {"type": "object", "properties": {"a": {}}, "required": ["b"]},
    "no #/$defs/b": {"$ref": "#/$defs/b"},
    "inside the schema": {"$ref": "http://localhost/a"},
    "type is 'text'": {"type": "text"},
    "no value": {"type": "string", "enum": [1]},
    "expected a schema": {"type": "array", "items": 3},
    "above": {"type": "string", "minLength": 3, "maxLength": 2},
    "unknown": {"type": "string", "unknown": 3},
    "multipleOf": {"type": "number", "multipleOf": 0.5},
    "unevaluatedProperties": {"type": "object", "unevaluatedProperties": False},
    "items/$ref": {"type": "array", "items": {"$ref": "#part"}},
    "items/$id": {"type": "array", "items": {"$id": "part"}},
    "satisfy two": {
        "oneOf": [{"$ref": "#/$defs/a"}, {"type": "null"}],
        "$defs": {"a": {"$ref": "#/$defs/a"}},
    },
    "decimal places": {"type": "number", "minimum": 1e-320, "maximum": 1.5e-320},
    "1e6 in size": {"type": "integer", "minimum": 10**400},
    "surrogate": {"enum": ["\ud800"]},
    "no number": {"enum": [float("nan")]},
}  # fmt: skip


@brief
@given(
    kind=st.sampled_from(["integer", "number"]),
    low=st.decimals(-2000, 2000, places=2),
    size=st.decimals(1, 3000, places=1),
    exclusive=st.booleans(),
    sides=st.sampled_from([(1, 1), (0, 1), (1, 0)]),
)
def test_numbers_keep_to_their_limits(
    kind: str, low: Any, size: Any, exclusive: bool, sides: tuple[int, int]
) -> None:
    names = ("exclusiveMinimum", "exclusiveMaximum")
    if not exclusive:
        names = ("minimum", "maximum")
    ends = (float(low), float(low + size))
    limits = {n: end for n, end, has in zip(names, ends, sides, strict=True) if has}
    form = {"type": kind, **limits}
    try:
        automaton = compile_form(schema(form), LETTERS)
    except FormError:
        assert kind == "integer" and all(sides) and size <= 2, form
        return
    for seed in range(8):
        text = bytes(walk(automaton, seed)).decode()
        jsonschema.validate(json.loads(text), form)
    for point in (0, 0.25, 0.5, 0.75, 1):
        value: float = float(low) + point * float(size)
        value = round(value) if kind == "integer" else round(value, 2) + 0.0
        is_valid = jsonschema.Draft202012Validator(form).is_valid(value)
        assert automaton.takes(list(json.dumps(value).encode())) == is_valid


@pytest.mark.parametrize("words", REFUSED)
def test_a_keyword_that_cannot_be_honoured_is_named(words: str) -> None:
    with pytest.raises(FormError, match=re.escape(words)):
        read_form(schema(REFUSED[words]))


@pytest.mark.parametrize(
    "pattern",
    [
        r"[a-c]{2,4}x?\d+(é|[^ü])*",
        r"^\d{3}-\d{4}$",
        r"(^a|b$)",
        r"\S+@\W?.",
        r"[^\W\d]+",
    ],
)
def test_each_answer_matches_its_expression(pattern: str) -> None:
    for text in texts(Form("regex", pattern)):
        assert re.fullmatch(pattern, text), text


expressions = st.recursive(
    st.sampled_from(["a", "b", "é", "[ab]", "[^a]", ".", r"\d", r"\s"]),
    lambda inner: st.one_of(
        st.lists(inner, min_size=1, max_size=3).map("".join),
        st.lists(inner, min_size=2, max_size=3).map("|".join).map("({})".format),
        inner.map("({})*".format),
        inner.map("({}){{1,2}}".format),
    ),
    max_leaves=6,
)


@brief
@given(pattern=expressions, words=st.lists(st.text("abé1 \n", max_size=4)))
def test_an_expression_takes_what_python_takes(pattern: str, words: list[str]) -> None:
    automaton = compile_form(Form("regex", pattern), LETTERS)
    for word in words:
        found = automaton.takes(list(word.encode()))
        assert found == bool(re.fullmatch(pattern, word)), (pattern, word)
    for seed in range(3):
        assert re.fullmatch(pattern, bytes(walk(automaton, seed, 6)).decode())


@pytest.mark.parametrize(
    "pattern", ["[", "(?=a)b", r"(a)\1", "(?i)a", "(?a)a", "a^b", "a(?-i:b)"]
)
def test_an_expression_without_an_automaton_is_refused(pattern: str) -> None:
    with pytest.raises(FormError):
        read_form(Form("regex", pattern))


def test_recursion_is_unrolled_to_a_depth() -> None:
    automaton = compile_form(Form("json_object"), LETTERS)

    def takes(value: Any) -> bool:
        return automaton.takes(list(json.dumps(value, ensure_ascii=False).encode()))

    assert takes({"a": [1, -2.5, True, None, {"b": []}], "c": "\u00e9\n"})
    nested: Any = {}
    for _ in range(MAX_DEPTH):
        nested = {"a": nested}
    assert takes(nested) and not takes({"a": nested}) and not takes([])
    assert not automaton.takes(list(b'{"a":1}')), "one spelling only"


def test_ebnf() -> None:
    nested = texts(Form("ebnf", 'root ::= "a" root "b" | "c"'))
    assert all(re.fullmatch("a*cb*", text) for text in nested)
    assert all(text.count("a") == text.count("b") for text in nested)
    with pytest.raises(FormError, match="it is no EBNF"):
        read_form(Form("ebnf", "root ::= [a"))


def test_tokens_of_many_bytes_agree_with_their_bytes() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    vocabulary = vocabulary_of(tokenizer, [tokenizer.eos_token_id], 384)
    form = schema(SCHEMAS["object"])
    automaton = compile_form(form, vocabulary)
    by_bytes = read_form(form)
    for seed in range(30):
        text = tokenizer.decode(walk(automaton, seed))
        jsonschema.validate(json.loads(text), SCHEMAS["object"])
        state = 0
        for byte in text.encode():
            state = by_bytes.next_state[state, byte]
        assert by_bytes.accepting[state]
    ids = tokenizer.encode('{"a": 12, "é \\"": true}', add_special_tokens=False)
    assert automaton.takes(ids)
    end = tokenizer.eos_token_id
    assert automaton.follow(automaton.start, [*ids, end, end]) == automaton.end
    assert automaton.follow(automaton.start, [end]) is None
    assert automaton.forced[automaton.start] == b'{"'
    # No valid answer is shorter: by brute force over the states.
    reached, num = {automaton.start}, 0
    while not any(automaton.accepting[state] for state in reached):
        from_here = np.isin(automaton.edge_source, list(reached))
        reached, num = set(automaton.edge_target[from_here].tolist()), num + 1
    assert automaton.min_tokens == num and automaton.distance.max() < NEVER


def test_a_vocabulary_that_cannot_say_it_is_an_error() -> None:
    no_quotes = Vocabulary([b"a", b"b"], [2], 3)
    with pytest.raises(FormError, match="no tokens"):
        compile_form(Form("json_object"), no_quotes)


@brief
@given(low=st.integers(0, 0x10FFFF), size=st.integers(0, 5000))
def test_ranges_of_bytes_are_those_of_characters(low: int, size: int) -> None:
    high = min(low + size, 0x10FFFF)
    found = list(byte_ranges([(low, high)]))
    wanted = [c for c in range(low, high + 1) if not 0xD800 <= c <= 0xDFFF]
    num = 0
    for ranges in found:
        count = 1
        for first, last in ranges:
            assert first <= last
            count *= last - first + 1
        num += count
    assert num == len(wanted)
    for code in wanted[:1] + wanted[-1:]:
        data = chr(code).encode()
        assert any(
            len(ranges) == len(data)
            and all(lo <= b <= hi for b, (lo, hi) in zip(data, ranges, strict=True))
            for ranges in found
        )
