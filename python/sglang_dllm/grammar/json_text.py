"""JSON values as parts of a grammar, in the form in which ``json.dumps`` writes them.

Every value has one spelling: ``", "`` and ``": "`` between values, characters as they
are, and an escape only where JSON asks for one. Numbers have few digits, so that they
are the same in all languages.
"""

from __future__ import annotations

import json
from typing import Any

from sglang_dllm.grammar.ebnf import (
    LAST_CHARACTER,
    Characters,
    Choice,
    FreeText,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
    mapped,
)
from sglang_dllm.grammar.errors import FormError

DIGIT = Characters(((48, 57),))
_NOT_ZERO = Characters(((49, 57),))
MINUS = Repeat(Text("-"), 0, 1)
_NATURAL = Choice((Text("0"), Sequence((_NOT_ZERO, Repeat(DIGIT, 0, 14)))))
_SIGN = Characters(((43, 43), (45, 45)))
_EXPONENT = Sequence((Text("e"), _SIGN, Repeat(DIGIT, 1, 2)))

INTEGER = Sequence((MINUS, _NATURAL))
NUMBER = Sequence(
    (
        INTEGER,
        Repeat(Sequence((Text("."), Repeat(DIGIT, 1, 15))), 0, 1),
        Repeat(_EXPONENT, 0, 1),
    )
)
BOOLEAN = Choice((Text("true"), Text("false")))
NULL = Text("null")

_PLAIN = ((0x20, 0x21), (0x23, 0x5B), (0x5D, LAST_CHARACTER))
_ESCAPED = (*range(0x20), 0x22, 0x5C)


def fixed(value: Any) -> Text:
    """One value."""
    try:
        return Text(json.dumps(value, ensure_ascii=False, allow_nan=False))
    except ValueError:
        raise FormError("it has a number that no float can hold") from None


def character(ranges: tuple[tuple[int, int], ...]) -> Node:
    """A character of these ranges inside of a string."""
    plain = [
        (max(low, start), min(high, end))
        for low, high in ranges
        for start, end in _PLAIN
        if max(low, start) <= min(high, end)
    ]
    escapes = [
        Text(json.dumps(chr(code))[1:-1])
        for code in _ESCAPED
        if any(low <= code <= high for low, high in ranges)
    ]
    return Choice((Characters(tuple(plain)), *escapes))


def content(node: Node) -> Node:
    """The inside of a string that has to match a part of a grammar."""

    def change(leaf: Node) -> Node:
        match leaf:
            case Text(text):
                return Text(json.dumps(text, ensure_ascii=False)[1:-1])
            case Characters(ranges):
                return character(ranges)
            case FreeText():
                raise FormError("a string has no free text")
            case _:
                return leaf

    return mapped(node, change)


def string(inside: Node) -> Node:
    return Sequence((Text('"'), inside, Text('"')))


# Control characters are left out: a model has no use for them.
ANY_CHARACTER = Choice(
    (Characters(_PLAIN), *(Text(one) for one in ("\\n", "\\t", '\\"', "\\\\")))
)
STRING = string(Repeat(ANY_CHARACTER, 0, None))


def array(item: Node, least: int = 0, most: int | None = None) -> Node:
    """An array of items of one kind."""
    if most == 0:
        return Text("[]")
    more = Repeat(
        Sequence((Text(", "), item)),
        max(0, least - 1),
        None if most is None else most - 1,
    )
    filled = Sequence((Text("["), item, more, Text("]")))
    return filled if least else Choice((filled, Text("[]")))


def map_of(value: Node) -> Node:
    """An object with any keys."""
    pair = Sequence((STRING, Text(": "), value))
    more = Repeat(Sequence((Text(", "), pair)), 0, None)
    return Choice((Sequence((Text("{"), pair, more, Text("}"))), Text("{}")))


ANY_RULES: Rules = {
    "any": Choice(
        (STRING, NUMBER, BOOLEAN, NULL, Rule("any array"), Rule("any object"))
    ),
    "any array": array(Rule("any")),
    "any object": map_of(Rule("any")),
}
"""The rules of any JSON value."""
