"""Reads the grammar that xgrammar prints.

xgrammar parses JSON schemas, regular expressions and EBNF, and prints each of them as
rules of one small language: alternatives, sequences, strings, classes of characters,
repetitions, and references to rules. A look-ahead behind a rule is a hint for its own
matcher and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from sglang_dllm.grammar.errors import FormError

LAST_CHARACTER = 0x10FFFF


@dataclass(frozen=True)
class Text:
    """A fixed string; it may be empty."""

    text: str


@dataclass(frozen=True)
class Characters:
    """One character of some ranges of code points, both ends included."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Rule:
    """A reference to a rule."""

    name: str


@dataclass(frozen=True)
class Sequence:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Choice:
    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """``least`` to ``most`` times; ``most`` is None for no limit."""

    part: Node
    least: int
    most: int | None


@dataclass(frozen=True)
class FreeText:
    """Any bytes up to a trigger, and then the part that has to follow the trigger.

    It is not among what xgrammar prints. The answer may end at each of its bytes.

    Attributes:
        parts: triggers, and the part behind each of them.
        excludes: texts that never come.
        goes_on: free text comes behind such a part too.
    """

    parts: tuple[tuple[str, Node], ...]
    excludes: tuple[str, ...]
    goes_on: bool


Node: TypeAlias = Text | Characters | Rule | Sequence | Choice | Repeat | FreeText
Rules: TypeAlias = dict[str, Node]

_RULE = re.compile(r"([A-Za-z_][\w.-]*)\s*::=\s*")
_NAME = re.compile(r"[A-Za-z_][\w.-]*")
_BOUNDS = re.compile(r"\{\s*(\d+)\s*(?:,\s*(-?\d*)\s*)?\}")
_HEX = {"x": 2, "u": 4, "U": 8}
_ESCAPES = {
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "0": "\0",
    "a": "\a",
    "b": "\b",
    "f": "\f",
    "v": "\v",
    "e": "\x1b",
}


def read_rules(text: str) -> Rules:
    """The rules of a printed grammar, by name.

    Raises:
        FormError: the grammar has a construct that is not of this language.
    """
    rules: Rules = {}
    for line in text.splitlines():
        if line.strip():
            found = _RULE.match(line)
            if found is None:
                raise FormError(f"the grammar has a line that is no rule: {line[:80]}")
            reader = _Reader(line, found.end())
            rules[found[1]] = reader.choice()
            reader.skip_look_ahead()
            reader.expect_end()
    return rules


def mapped(node: Node, change: Callable[[Node], Node]) -> Node:
    """The same part with each part changed that has no parts of its own."""
    match node:
        case Sequence(parts):
            return Sequence(tuple(mapped(part, change) for part in parts))
        case Choice(parts):
            return Choice(tuple(mapped(part, change) for part in parts))
        case Repeat(part, least, most):
            return Repeat(mapped(part, change), least, most)
        case _:
            return change(node)


def renamed(rules: Rules, prefix: str) -> Rules:
    """The same rules with a prefix before each name."""

    def change(node: Node) -> Node:
        return Rule(prefix + node.name) if isinstance(node, Rule) else node

    return {prefix + name: mapped(node, change) for name, node in rules.items()}


class _Reader:
    def __init__(self, text: str, at: int) -> None:
        self.text, self.at = text, at

    def peek(self) -> str:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1
        return self.text[self.at : self.at + 1]

    def take(self, wanted: str) -> bool:
        self.peek()
        if not self.text.startswith(wanted, self.at):
            return False
        self.at += len(wanted)
        return True

    def fail(self) -> FormError:
        part = self.text[self.at : self.at + 40]
        return FormError(f"the grammar has a construct that is not served: {part}")

    def expect_end(self) -> None:
        if self.peek():
            raise self.fail()

    def skip_look_ahead(self) -> None:
        if self.take("(="):
            self.choice()
            if not self.take(")"):
                raise self.fail()

    def choice(self) -> Node:
        parts = [self.sequence()]
        while self.take("|"):
            parts.append(self.sequence())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def sequence(self) -> Node:
        parts = []
        while self.peek() and self.peek() not in "|)":
            if self.text.startswith("(=", self.at):
                break
            parts.append(self.repeated())
        return parts[0] if len(parts) == 1 else Sequence(tuple(parts))

    def repeated(self) -> Node:
        node = self.single()
        while True:
            if self.take("*"):
                node = Repeat(node, 0, None)
            elif self.take("+"):
                node = Repeat(node, 1, None)
            elif self.take("?"):
                node = Repeat(node, 0, 1)
            elif bounds := _BOUNDS.match(self.text, self.at):
                self.at = bounds.end()
                least, most = int(bounds[1]), bounds[2]
                if most is None:
                    node = Repeat(node, least, least)
                else:
                    has_end = most not in ("", "-1")
                    node = Repeat(node, least, int(most) if has_end else None)
            else:
                return node

    def single(self) -> Node:
        sign = self.peek()
        if sign == "(":
            self.at += 1
            node = self.choice()
            if not self.take(")"):
                raise self.fail()
            return node
        if sign == '"':
            return self.string()
        if sign == "[":
            return self.characters()
        name = _NAME.match(self.text, self.at)
        if name is None:
            raise self.fail()
        self.at = name.end()
        # A construct such as TagDispatch(...). A rule has no arguments, and xgrammar
        # prints a space before the parenthesis of a group.
        if self.text.startswith("(", self.at):
            raise self.fail()
        return Rule(name[0])

    def string(self) -> Text:
        self.at += 1
        found = []
        while not self.text.startswith('"', self.at):
            if self.at >= len(self.text):
                raise self.fail()
            found.append(self.character())
        self.at += 1
        return Text("".join(map(chr, found)))

    def characters(self) -> Characters:
        self.at += 1
        negated = self.text.startswith("^", self.at)
        self.at += negated
        ranges = []
        while not self.text.startswith("]", self.at):
            if self.at >= len(self.text):
                raise self.fail()
            low = high = self.character()
            is_range = self.text.startswith("-", self.at)
            if is_range and not self.text.startswith("-]", self.at):
                self.at += 1
                high = self.character()
            ranges.append((low, high))
        self.at += 1
        return Characters(tuple(complement(ranges) if negated else ranges))

    def character(self) -> int:
        sign = self.text[self.at]
        self.at += 1
        if sign != "\\":
            return ord(sign)
        sign = self.text[self.at : self.at + 1]
        self.at += 1
        if sign in _HEX:
            digits = self.text[self.at : self.at + _HEX[sign]]
            self.at += len(digits)
            try:
                return int(digits, 16)
            except ValueError:
                raise self.fail() from None
        return ord(_ESCAPES.get(sign, sign or "\\"))


def complement(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The ranges of all other characters."""
    found, start = [], 0
    for low, high in sorted(ranges):
        if low > start:
            found.append((start, low - 1))
        start = max(start, high + 1)
    if start <= LAST_CHARACTER:
        found.append((start, LAST_CHARACTER))
    return found
