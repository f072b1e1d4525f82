"""Free text with structures behind triggers, against a plain scan of the text."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import xgrammar
from hypothesis import given, settings
from hypothesis import strategies as st
from xgrammar.testing import _is_grammar_accept_string

from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.forms import Form, compile_form, read_form
from sglang_dllm.grammar.tagged import goes_on, has_free_text
from sglang_dllm.grammar.token_automaton import Vocabulary

EOS, MASK, SPECIAL, MARK, EMPTY = range(256, 261)
BYTES = Vocabulary(
    [bytes([byte]) for byte in range(256)],
    [EOS],
    262,
    silent={SPECIAL: b"[x]", MARK: b"<f", EMPTY: b""},
    never=[MASK],
)
BOOLEAN = {"type": "boolean"}


def legacy(**more: Any) -> Form:
    structures = [
        {"begin": "<f>", "schema": BOOLEAN, "end": "</f>"},
        {"begin": "<fg", "schema": {"enum": [1, "<f"]}, "end": ""},
        {"begin": "ab", "schema": {"const": None}, "end": "!"},
    ]
    tag = {"structures": structures, "triggers": ["<f", "ab"], **more}
    return Form("structural_tag", json.dumps(tag))


def triggered(**more: Any) -> Form:
    tags = [
        {
            **{"type": "tag", "begin": "<f>", "end": ["</f>", "!"]},
            "content": {"type": "json_schema", "json_schema": BOOLEAN},
        },
        {
            **{"type": "tag", "begin": "<fg", "end": ""},
            "content": {"type": "regex", "pattern": '1|"<f"'},
        },
        {
            **{"type": "tag", "begin": "ab", "end": "!"},
            "content": {"type": "const_string", "value": "null"},
        },
    ]
    form = {"type": "triggered_tags", "triggers": ["<f", "ab"], "tags": tags, **more}
    return Form(
        "structural_tag", json.dumps({"type": "structural_tag", "format": form})
    )


LEGACY = r"<f>(true|false)</f>|<fg(1|\"<f\")|abnull!"
NEWER = r"<f>(true|false)(</f>|!)|<fg(1|\"<f\")|abnull!"


def is_valid(
    text: str,
    structure: str,
    *,
    first: bool = False,
    goes_on: bool = True,
    excludes: tuple[str, ...] = (),
) -> bool:
    """A plain scan: wherever a trigger is, a structure must be."""
    at = 0
    if first:
        found = re.compile(structure).match(text)
        if not found:
            return False
        at = found.end()
        if not goes_on:
            return at == len(text)
    while True:
        places = [text.find(trigger, at) for trigger in ("<f", "ab")]
        begin = min((place for place in places if place >= 0), default=len(text))
        if any(word in text[at : begin + 1] for word in excludes):
            return False
        if begin == len(text):
            return True
        found = re.compile(structure).match(text, begin)
        if not found:
            return False
        at = found.end()
        if not goes_on:
            return at == len(text)


PIECES = ["<f>", "true", "</f>", "<fg", "1", '"<f"', "ab", "null", "!", "<", "a", "b"]
PIECES += ["<f>true</f>", "<fg1", "abnull!", "x", "é", "f", '<fg"<f"']
TEXTS = st.lists(st.sampled_from(PIECES), max_size=7).map("".join)
CASES: list[tuple[Form, str, dict[str, Any]]] = [
    (legacy(), LEGACY, {}),
    (legacy(at_least_one=True), LEGACY, {"first": True, "goes_on": False}),
    (triggered(), NEWER, {}),
    (triggered(at_least_one=True), NEWER, {"first": True}),
    (triggered(stop_after_first=True), NEWER, {"goes_on": False}),
    (triggered(excludes=["x"]), NEWER, {"excludes": ("x",)}),
    (
        triggered(at_least_one=True, stop_after_first=True),
        NEWER,
        {"first": True, "goes_on": False},
    ),
]


@pytest.mark.parametrize("case", range(len(CASES)))
@settings(max_examples=150, deadline=None)
@given(text=TEXTS)
def test_the_automaton_takes_what_a_scan_takes(case: int, text: str) -> None:
    """xgrammar reads the newer tags in the same way."""
    form, structure, rules = CASES[case]
    takes = compile_form(form, BYTES).takes(list(text.encode()))
    assert takes == is_valid(text, structure, **rules)
    if '"format"' in form.text:
        theirs = xgrammar.Grammar.from_structural_tag(form.text)
        assert takes == _is_grammar_accept_string(theirs, text)


def test_bytes_that_are_no_characters_are_free_text() -> None:
    automaton = compile_form(legacy(), BYTES)
    assert automaton.takes([0xC3, 0x28, 0xFF, *b"<f>true</f>", 0xE4])
    assert not automaton.takes([0xC3, *b"<f", 0xFF])


def test_tokens_that_are_no_text_come_in_free_text() -> None:
    """They are shown or not, and neither may make a trigger."""
    automaton = compile_form(legacy(), BYTES)
    for token in (SPECIAL, EMPTY, 261):
        takes = token != 261
        assert automaton.takes([token, *b"x", token]) == takes
        assert automaton.takes([*b"<f>true</f>", token]) == takes
        assert not automaton.takes([*b"<", token, *b"f>true</f>"])
        assert not automaton.takes([*b"<f>", token, *b"true</f>"])
    assert not automaton.takes([MARK])
    assert not compile_form(legacy(at_least_one=True), BYTES).takes([SPECIAL])
    behind = automaton.follow(automaton.start, [*b"a", EOS])
    assert behind == automaton.end
    assert automaton.follow(behind, [EOS]) == behind
    assert automaton.follow(behind, [SPECIAL]) is None
    inside = automaton.follow(automaton.start, list(b"<f>tr"))
    assert automaton.follow(inside, [EOS]) is None


def test_a_tag_says_whether_text_may_go_on() -> None:
    for form, expected in (
        (legacy(), (True, True)),
        (legacy(at_least_one=True), (False, False)),
        (triggered(at_least_one=True), (True, True)),
        (triggered(stop_after_first=True), (True, False)),
        (triggered(at_least_one=True, stop_after_first=True), (False, False)),
        (Form("structural_tag", ""), (False, False)),
    ):
        assert (has_free_text(form.text), goes_on(form.text)) == expected


def wrong(**more: Any) -> Form:
    (tag, *_), found = json.loads(triggered().text)["format"]["tags"], {}
    for key in ("begin", "content", "end"):
        if key in more:
            found[key] = more.pop(key)
    return triggered(**{"triggers": ["<f"], "tags": [{**tag, **found}], **more})


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (legacy(triggers=None), "triggers: .*at least 1 string"),
        (legacy(triggers=["<f", "ab", "zz"]), r"triggers\[2\]: no structure"),
        (legacy(triggers=["<f"]), r"structures\[2\]\.begin: .*triggers"),
        (legacy(triggers=["<f", "ab", "b"]), "'b' is inside of another|no structure"),
        (legacy(triggers=["<f", "ab", ""]), "no structure|inside"),
        (legacy(at_least_one="yes"), 'at_least_one: .*found "yes"'),
        (triggered(type="or"), 'format.type: .*found "or"'),
        (triggered(tags=[]), "format.tags: .*at least 1"),
        (triggered(tags=[5]), r"format.tags\[0\]: .*found 5"),
        (triggered(triggers=[5]), r"format.triggers\[0\]: .*found 5"),
        (triggered(excludes="x"), "format.excludes"),
        (triggered(stop_after_first=3), "format.stop_after_first"),
        (wrong(begin={"type": "token", "token": 3}), r"tags\[0\]\.begin"),
        (wrong(end=[]), r"tags\[0\]\.end"),
        (wrong(content={"type": "any_text"}), r'content.type: .*"any_text"'),
        (wrong(content={"type": "json_schema", "json_schema": {"not": {}}}),
         r"format.tags\[0\]\.content: .*not"),
        (wrong(content={"type": "json_schema", "style": "qwen_xml"}), "content.style"),
        (wrong(content={"type": "regex", "pattern": "("}), r"tags\[0\]\.content"),
        (wrong(triggers=["\ud800"], begin="\ud800"), "surrogate"),
    ],
)  # fmt: skip
def test_a_tag_that_is_not_served_is_named(form: Form, words: str) -> None:
    with pytest.raises(FormError, match=words):
        read_form(form)


def test_a_repeated_content_is_read_once() -> None:
    """Fifty functions with arguments of any kind stay one automaton's part."""
    structures = [
        {"begin": f"<f>{i}:", "schema": {"type": "object"}, "end": "</f>"}
        for i in range(50)
    ]
    tag = {"structures": structures, "triggers": ["<f>"]}
    form = Form("structural_tag", json.dumps(tag))
    automaton = compile_form(form, BYTES)
    assert automaton.takes([*b'x<f>49:{"a": [1]}</f>y'])
    assert not automaton.takes([*b"x<f>50:{}</f>"])
