"""Structural tags, and the tokens that their texts may have."""

from __future__ import annotations

import json
from typing import Any

import pytest
from transformers import AddedToken, AutoTokenizer

from sglang_dllm.demo import demo_path
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.forms import Form, compile_form, read_form, vocabulary_of
from sglang_dllm.grammar.token_automaton import Vocabulary

BYTES = Vocabulary([bytes([byte]) for byte in range(256)] + [None], [256], 257)
NODE = {
    "type": "object",
    "properties": {"next": {"$ref": "#/$defs/a"}},
    "required": ["next"],
    "$defs": {"a": {"type": "integer"}},
}


def tag(*structures: Any, **more: Any) -> Form:
    found = {"structures": list(structures), "at_least_one": True, **more}
    return Form("structural_tag", json.dumps(found))


def structure(name: str, schema: Any = None) -> dict[str, Any]:
    return {"begin": f"<{name}>", "schema": schema, "end": f"</{name}>"}


def test_an_answer_is_one_structure() -> None:
    """Schemas may have rules of one name that are not the same."""
    other = {**NODE, "$defs": {"a": {"type": "boolean"}}}
    automaton = compile_form(tag(structure("f", NODE), structure("g", other)), BYTES)

    def takes(text: str) -> bool:
        return automaton.takes(list(text.encode()))

    assert takes('<f>{"next": 12}</f>')
    assert takes('<g>{"next": true}</g>')
    for wrong in (
        '<g>{"next": 12}</g>',
        '<f>{"next": 12}</g>',
        '<f>{"next": 12}</f><f>{"next": 12}</f>',
        '<f>{"next": 12}</f>.',
        "",
    ):
        assert not takes(wrong), wrong


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (tag(structure("f"), at_least_one=False), "triggers"),
        (tag(), "structures"),
        (Form("structural_tag", "{"), "no JSON"),
        (Form("structural_tag", "[]"), "structures"),
        (tag({"begin": "a"}), r"structures\[0\]\.end"),
        (tag(structure("f"), 5), r"structures\[1\]"),
        (tag(structure("f", {"type": "x"})), r"structures\[0\]\.schema: .*'x'"),
    ],
)
def test_a_tag_of_another_shape_is_refused(form: Form, words: str) -> None:
    with pytest.raises(FormError, match=words):
        read_form(form)


def test_an_added_token_is_text_and_a_special_one_is_not() -> None:
    tokenizer = AutoTokenizer.from_pretrained(demo_path())
    tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    tokenizer.add_tokens([AddedToken("<end>", special=True)], special_tokens=True)
    size = len(tokenizer)
    vocabulary = vocabulary_of(tokenizer, [tokenizer.eos_token_id], size)
    automaton = compile_form(Form("regex", "<call>|<end>"), vocabulary)
    call, end = tokenizer.convert_tokens_to_ids(["<call>", "<end>"])
    assert automaton.takes([call])
    assert not automaton.takes([end])
    spelled = tokenizer.convert_tokens_to_ids(list("<end>"))
    assert automaton.takes(spelled) and tokenizer.decode(spelled) == "<end>"
