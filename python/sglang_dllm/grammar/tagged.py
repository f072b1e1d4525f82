"""SGLang's structural tags: values between two fixed texts, as tool calls are.

A tag has triggers, or its answer is one of its structures and no more. With triggers,
the text is free until a trigger is complete. A trigger is the beginning of a structure,
and one of the structures that it begins has to follow. Then the text is free again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sglang_dllm.grammar.ebnf import (
    Choice,
    FreeText,
    Node,
    Rule,
    Rules,
    Sequence,
    Text,
    renamed,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.json_schema import read_schema
from sglang_dllm.grammar.regex import read_regex
from sglang_dllm.grammar.work import Work

_CONTENTS = ("json_schema", "regex", "const_string")


@dataclass(frozen=True)
class _Structure:
    """
    Attributes:
        place, place_of_content: in the tag, for errors.
        content: an object as xgrammar's formats are.
    """

    place: str
    place_of_content: str
    begin: str
    content: Mapping[str, Any]
    ends: tuple[str, ...]


@dataclass(frozen=True)
class _Tag:
    """
    Attributes:
        begins_with_one: no free text is in front of the first structure.
        goes_on: free text is behind a structure.
    """

    structures: tuple[_Structure, ...]
    triggers: tuple[str, ...]
    begins_with_one: bool
    goes_on: bool
    excludes: tuple[str, ...] = ()


def read_tag(text: str, work: Work) -> Rules:
    """The rules of a structural tag.

    Args:
        text: the JSON of ``{"structures": [{"begin", "schema", "end"}], "triggers"}``,
            with ``at_least_one: true`` instead of triggers for one structure without
            other text; or of ``{"format": {"type": "triggered_tags", …}}``, as xgrammar
            has it.

    Raises:
        FormError: it has another shape, or a schema is refused.
    """
    tag, contents = _read(text), _Contents(work)
    rests = [contents.rest(one) for one in tag.structures]
    pairs = list(zip(tag.structures, rests, strict=True))
    first = Choice(tuple(Sequence((Text(one.begin), rest)) for one, rest in pairs))
    if tag.begins_with_one and not tag.goes_on:
        return {**contents.rules, "root": first}
    parts: dict[str, list[Node]] = {trigger: [] for trigger in tag.triggers}
    for one, rest in pairs:
        trigger = next(filter(one.begin.startswith, parts), None)
        if trigger is None:
            raise FormError(f"{one.place}.begin: expected one of triggers in front")
        text_behind = Text(one.begin[len(trigger) :])
        parts[trigger].append(Sequence((text_behind, rest)))
    for i, trigger in enumerate(tag.triggers):
        if not parts[trigger]:
            raise FormError(f"triggers[{i}]: no structure begins with it")
    free = FreeText(
        tuple((trigger, Choice(tuple(some))) for trigger, some in parts.items()),
        tag.excludes,
        tag.goes_on,
    )
    root = Sequence((first, free)) if tag.begins_with_one else free
    return {**contents.rules, "root": root}


def has_free_text(text: str) -> bool:
    """True if an answer of this tag may have text that is no structure."""
    tag = _read_or_none(text)
    return tag is not None and not (tag.begins_with_one and not tag.goes_on)


def goes_on(text: str) -> bool:
    """True if an answer of this tag may go on as free text, wherever one may end."""
    tag = _read_or_none(text)
    return tag is not None and tag.goes_on


def _read_or_none(text: str) -> _Tag | None:
    try:
        return _read(text)
    except FormError:
        return None


@dataclass
class _Contents:
    """The rules of contents. Structures with equal ones share them."""

    work: Work
    rules: Rules = field(default_factory=dict)
    _names: dict[str, str] = field(default_factory=dict)

    def rest(self, structure: _Structure) -> Rule:
        """The rule of a structure's content and end."""
        key = json.dumps(structure.content)
        if key not in self._names:
            name = self._names[key] = str(len(self._names))
            self.rules |= renamed(self._read(structure), f"{name} ")
        name = self._names[key]
        rest = f"{name} and {json.dumps(structure.ends)}"
        ends = Choice(tuple(map(Text, structure.ends)))
        self.rules[rest] = Sequence((Rule(f"{name} root"), ends))
        return Rule(rest)

    def _read(self, structure: _Structure) -> Rules:
        content = structure.content
        try:
            match content["type"]:
                case "json_schema":
                    return read_schema(json.dumps(content["json_schema"]), self.work)
                case "regex":
                    return {"root": read_regex(content["pattern"], self.work)}
                case _:
                    return {"root": Text(content["value"])}
        except FormError as error:
            raise FormError(f"{structure.place_of_content}: {error}") from None


def _read(text: str) -> _Tag:
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is no JSON: {error}") from None
    if not isinstance(tag, dict):
        raise FormError("expected an object with structures or with a format")
    if tag.get("format") is not None:
        return _of_format(tag["format"])
    is_one = _flag("", tag, "at_least_one")
    found = tuple(
        _structure(f"structures[{i}]", one)
        for i, one in enumerate(_objects("structures", tag.get("structures")))
    )
    triggers = () if is_one else _texts("triggers", tag.get("triggers"), 1)
    return _Tag(found, triggers, is_one, not is_one)


def _structure(place: str, given: Mapping[str, Any]) -> _Structure:
    begin, end = (_text(f"{place}.{key}", given.get(key)) for key in ("begin", "end"))
    content = {"type": "json_schema", "json_schema": given.get("schema") or {}}
    return _Structure(place, f"{place}.schema", begin, content, (end,))


def _of_format(given: Any) -> _Tag:
    kind = given.get("type") if isinstance(given, dict) else given
    if kind != "triggered_tags":
        raise FormError(f"format.type: expected triggered_tags, found {_shown(kind)}")
    return _Tag(
        tuple(
            _tag(f"format.tags[{i}]", one)
            for i, one in enumerate(_objects("format.tags", given.get("tags")))
        ),
        _texts("format.triggers", given.get("triggers"), 1),
        _flag("format.", given, "at_least_one"),
        not _flag("format.", given, "stop_after_first"),
        _texts("format.excludes", given.get("excludes") or [], 0),
    )


def _tag(place: str, given: Mapping[str, Any]) -> _Structure:
    content = given.get("content")
    kind = content.get("type") if isinstance(content, dict) else content
    if not isinstance(content, dict) or kind not in _CONTENTS:
        expected = ", ".join(_CONTENTS)
        raise FormError(
            f"{place}.content.type: expected one of {expected}, found {_shown(kind)}"
        )
    if content.get("style", "json") != "json":
        shown = _shown(content["style"])
        raise FormError(f"{place}.content.style: expected json, found {shown}")
    keys = {"regex": "pattern", "const_string": "value"}
    if kind in keys:
        key = keys[kind]
        content = {"type": kind, key: _text(f"{place}.content.{key}", content.get(key))}
    else:
        schema = content.get("json_schema")
        content = {"type": kind, "json_schema": {} if schema is None else schema}
    begin, end = _text(f"{place}.begin", given.get("begin")), given.get("end")
    ends = end if isinstance(end, list) else [end]
    found = _texts(f"{place}.end", ends, 1)
    return _Structure(place, f"{place}.content", begin, content, found)


def _objects(place: str, given: Any) -> list[dict[str, Any]]:
    if not isinstance(given, list) or not given:
        raise FormError(f"{place}: expected a list of at least 1 object")
    for i, one in enumerate(given):
        if not isinstance(one, dict):
            raise FormError(f"{place}[{i}]: expected an object, found {_shown(one)}")
    return given


def _texts(place: str, given: Any, least: int) -> tuple[str, ...]:
    if not isinstance(given, list) or len(given) < least:
        raise FormError(f"{place}: expected a list of at least {least} string")
    return tuple(_text(f"{place}[{i}]", one) for i, one in enumerate(given))


def _text(place: str, given: Any) -> str:
    if not isinstance(given, str):
        raise FormError(f"{place}: expected a string, found {_shown(given)}")
    return given


def _flag(place: str, given: Mapping[str, Any], key: str) -> bool:
    value = given.get(key)
    if value not in (None, False, True):
        raise FormError(f"{place}{key}: expected true or false, found {_shown(value)}")
    return bool(value)


def _shown(value: Any) -> str:
    return json.dumps(value)[:80]
