"""A JSON schema as the rules of a grammar: what they produce, the schema accepts.

The rules produce less than a schema accepts: properties come in the schema's order and
there are no others, patterns match whole strings. A keyword that the rules cannot
honour is refused by name, because an answer would be wrong without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from sglang_dllm.grammar import json_text
from sglang_dllm.grammar.ebnf import (
    Choice,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.number_range import (
    MAX_MULTIPLE,
    multiples,
    numbers_in_range,
)
from sglang_dllm.grammar.regex import read_regex
from sglang_dllm.grammar.string_formats import FORMATS
from sglang_dllm.grammar.work import Work

_NOTES = frozenset(
    {
        *("title", "description", "default", "example", "examples", "$schema", "$id"),
        *("$comment", "$defs", "definitions", "deprecated", "readOnly", "writeOnly"),
        *("contentEncoding", "contentMediaType", "discriminator", "nullable"),
    }
)
_BY_TYPE: Mapping[str, frozenset[str]] = {
    "object": frozenset({"properties", "required", "additionalProperties"}),
    "array": frozenset({"items", "prefixItems", "minItems", "maxItems"}),
    "string": frozenset({"minLength", "maxLength", "pattern", "format"}),
    "integer": frozenset(
        {
            *("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
            "multipleOf",
        }
    ),
    "number": frozenset({"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"}),
    "boolean": frozenset(),
    "null": frozenset(),
}
_OF_ANY_TYPE = frozenset({"type", "enum", "const"})
_CHOICES = ("anyOf", "oneOf", "allOf")
_MAX_REFERENCES = 16
_HARMLESS = {"uniqueItems": False, "unevaluatedProperties": False}
"""Values with which a keyword asks for nothing, or for what the rules do anyway."""


def read_schema(text: str, work: Work) -> Rules:
    """The rules of a JSON schema.

    Raises:
        FormError: naming place and keyword that cannot be honoured; or it is too large.
    """
    try:
        schema = json.loads(text, parse_constant=_no_constant)
    except ValueError as error:
        raise FormError(f"it is no JSON: {error}") from None
    reader = _Reader(schema, work)
    try:
        reader.rules["root"] = reader.value(schema, "#")
    except OverflowError:
        raise FormError("it has a number that no float can hold") from None
    return reader.rules


class _Reader:
    def __init__(self, root: Any, work: Work) -> None:
        self.root, self._work = root, work
        self.rules: Rules = dict(json_text.ANY_RULES)
        self._kinds: dict[str, Callable[[dict[str, Any], str], Node]] = {
            "object": self.object,
            "array": self.array,
            "string": self.string,
            "integer": self.integer,
            "number": self.number,
            "boolean": lambda schema, at: json_text.BOOLEAN,
            "null": lambda schema, at: json_text.NULL,
        }

    def value(self, schema: Any, at: str) -> Node:
        self._work.spend(32)
        if schema is True or schema == {}:
            return Rule("any")
        if not isinstance(schema, dict):
            raise FormError(f"{at} is {json.dumps(schema)[:40]}; expected a schema")
        asked = {
            key: value
            for key, value in schema.items()
            if key not in _NOTES
            and not key.startswith("x-")
            and not _is_harmless(key, value, schema)
        }
        if at != "#" and "$id" in schema:
            raise FormError(f"{at}/$id is not served below the root")
        if not asked:
            return Rule("any")
        if "$ref" in asked:
            self.expect_alone(asked, "$ref", at)
            return self.reference(asked["$ref"], at)
        for key in _CHOICES:
            if key in asked:
                self.expect_alone(asked, key, at)
                return self.choice(key, asked[key], at)
        types = _types_of(asked, at)
        served = _OF_ANY_TYPE.union(*(_BY_TYPE[one] for one in types))
        known = _OF_ANY_TYPE.union(*_BY_TYPE.values())
        for key in asked:
            # A keyword of another type asks for nothing.
            is_known = key in (served if "type" not in asked else known)
            if not is_known or (key == "multipleOf" and "number" in types):
                raise FormError(f"{at}/{key} is not served")
        if "enum" in asked or "const" in asked:
            return self.fixed(asked, types, at)
        options = [self._kinds[one](asked, at) for one in types]
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def expect_alone(self, asked: dict[str, Any], key: str, at: str) -> None:
        others = sorted(asked.keys() - {key})
        if others:
            raise FormError(f"{at}/{others[0]} beside {key} is not served")

    def reference(self, target: Any, at: str) -> Node:
        # A name such as "#part" is an anchor; "%" is an escape of addresses.
        is_path = isinstance(target, str) and (target == "#" or target[:2] == "#/")
        if not is_path or "%" in target:
            raise FormError(f"{at}/$ref is not served; expected one inside the schema")
        if target not in self.rules:
            schema = self.root
            for part in target.split("/")[1:]:
                key = part.replace("~1", "/").replace("~0", "~")
                if not isinstance(schema, dict) or key not in schema:
                    raise FormError(f"{at}/$ref: there is no {target}")
                schema = schema[key]
            self.rules[target] = Text("")  # until it is known, for references to it
            self.rules[target] = self.value(schema, target)
        return Rule(target)

    def choice(self, key: str, schemas: Any, at: str) -> Node:
        if not isinstance(schemas, list) or not schemas:
            raise FormError(f"{at}/{key}: expected a list of schemas")
        if key == "allOf" and len(schemas) > 1:
            raise FormError(f"{at}/allOf with several schemas is not served")
        if key == "oneOf" and not self.are_disjoint(schemas):
            raise FormError(
                f"{at}/oneOf is not served where a value may satisfy two; expected "
                "anyOf, different types, or a property with a const of its own"
            )
        parts = [
            self.value(one, f"{at}/{key}/{index}") for index, one in enumerate(schemas)
        ]
        return Choice(tuple(parts))

    def are_disjoint(self, schemas: list[Any]) -> bool:
        """True if it is plain that no value satisfies two of them."""
        marks = [self.mark(one) for one in schemas]
        self._work.spend(len(schemas) ** 2)
        return all(
            one is not None and other is not None and _differ(one, other)
            for index, one in enumerate(marks)
            for other in marks[:index]
        )

    def mark(self, schema: Any) -> tuple[str, dict[str, list[str]]] | None:
        """A schema's type, and the values that its required properties may have."""
        # A reference may lead back to itself.
        for _ in range(_MAX_REFERENCES):
            target = schema.get("$ref") if isinstance(schema, dict) else None
            if not isinstance(target, str) or "~" in target:
                break
            schema = self.root
            for part in target.split("/")[1:]:
                schema = schema.get(part, {}) if isinstance(schema, dict) else {}
        if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
            return None
        consts: dict[str, list[str]] = {}
        names, properties = schema.get("required"), schema.get("properties")
        if not isinstance(names, list) or not isinstance(properties, dict):
            return schema["type"], consts
        for name in names:
            one = properties.get(name) if isinstance(name, str) else None
            if not isinstance(one, dict):
                continue
            values = [one["const"]] if "const" in one else one.get("enum")
            # Numbers that are equal may be written differently: 1 and 1.0.
            if isinstance(values, list) and all(isinstance(v, str) for v in values):
                consts[name] = values
        return schema["type"], consts

    def fixed(self, asked: dict[str, Any], types: list[str], at: str) -> Node:
        values = asked.get("enum", [asked.get("const")])
        if not isinstance(values, list):
            raise FormError(f"{at}/enum: expected a list")
        if "const" in asked:
            # As texts: True equals 1 in Python, but not in a schema.
            wanted = json.dumps(asked["const"])
            values = [value for value in values if json.dumps(value) == wanted]
        if "type" in asked:
            values = [v for v in values if any(_has_type(v, one) for one in types)]
        others = asked.keys() - {"enum", "const", "type"}
        if others:
            raise FormError(f"{at}/{min(others)} beside enum or const is not served")
        if not values:
            raise FormError(f"{at}: no value has this form")
        return Choice(tuple(map(json_text.fixed, values)))

    def object(self, asked: dict[str, Any], at: str) -> Node:
        properties = asked.get("properties", {})
        required = asked.get("required", [])
        others = asked.get("additionalProperties", not properties)
        if not isinstance(properties, dict) or not isinstance(required, list):
            raise FormError(f"{at}: properties must be an object, required a list")
        for name in required:
            if not isinstance(name, str) or name not in properties:
                raise FormError(f"{at}/required names {name!r}, which has no property")
        if not properties:
            if others is False:
                return Text("{}")
            below = f"{at}/additionalProperties"
            return json_text.map_of(self.value(others, below))
        parts: list[Node] = [
            Sequence(
                (
                    json_text.fixed(name),
                    Text(": "),
                    self.value(schema, f"{at}/properties/{_escaped(name)}"),
                )
            )
            for name, schema in properties.items()
        ]
        names = set(required)
        needed = [name in names for name in properties]
        return Sequence((Text("{"), self.members(parts, needed, at), Text("}")))

    def members(self, parts: list[Node], needed: list[bool], at: str) -> Node:
        """The properties in their order; one that is not needed may be left out."""
        rest: dict[bool, Node] = {True: Text(""), False: Text("")}
        for index in reversed(range(len(parts))):
            found: dict[bool, Node] = {}
            for is_first in (True, False):
                comma = Text("" if is_first else ", ")
                node: Node = Sequence((comma, parts[index], rest[False]))
                if not needed[index]:
                    node = Choice((node, rest[is_first]))
                # A rule, since it is behind several others.
                name = f"{at} {index} {is_first}"
                self.rules[name], found[is_first] = node, Rule(name)
            rest = found
        return rest[True]

    def array(self, asked: dict[str, Any], at: str) -> Node:
        least, most = _bounds(asked, "minItems", "maxItems", at)
        first = asked.get("prefixItems", [])
        items = asked.get("items", True)
        if not isinstance(first, list):
            raise FormError(f"{at}/prefixItems: expected a list of schemas")
        if not first:
            if items is False:
                return Text("[]")
            return json_text.array(self.value(items, f"{at}/items"), least, most)
        if most not in (None, len(first)) or least not in (0, len(first)):
            raise FormError(f"{at}/minItems beside prefixItems is not served")
        # Exactly these: fewer are allowed by the schema, but nobody means it.
        parts: list[Node] = [Text("[")]
        for index, schema in enumerate(first):
            parts.append(Text(", " if index else ""))
            parts.append(self.value(schema, f"{at}/prefixItems/{index}"))
        return Sequence((*parts, Text("]")))

    def string(self, asked: dict[str, Any], at: str) -> Node:
        least, most = _bounds(asked, "minLength", "maxLength", at)
        of_form = [key for key in ("pattern", "format") if key in asked]
        if len(of_form) + bool({"minLength", "maxLength"} & asked.keys()) > 1:
            raise FormError(f"{at}/{of_form[0]} beside another limit is not served")
        if not of_form:
            inside = Repeat(json_text.ANY_CHARACTER, least, most)
            return json_text.string(inside)
        pattern = asked.get("pattern")
        if "format" in asked:
            pattern = FORMATS.get(str(asked["format"]))
            if pattern is None:
                known = ", ".join(FORMATS)
                raise FormError(f"{at}/format is not served; expected one of {known}")
        if not isinstance(pattern, str):
            raise FormError(f"{at}/pattern: expected a string")
        try:
            return json_text.string(json_text.content(read_regex(pattern, self._work)))
        except FormError as error:
            raise FormError(f"{at}/pattern: {error}") from None

    def integer(self, asked: dict[str, Any], at: str) -> Node:
        of = asked.get("multipleOf", 1)
        if type(of) is not int or not 1 <= of <= MAX_MULTIPLE:
            raise FormError(
                f"{at}/multipleOf is {of!r}; expected an integer from 1 to "
                f"{MAX_MULTIPLE}"
            )
        in_range = self.in_range("integer", asked, at)
        if of == 1:
            return in_range or json_text.INTEGER
        if in_range:
            raise FormError(f"{at}/multipleOf beside a limit is not served")
        self._work.spend(48 * of)
        return multiples(of, f"{at} remainder", self.rules)

    def number(self, asked: dict[str, Any], at: str) -> Node:
        return self.in_range("number", asked, at) or json_text.NUMBER

    def in_range(self, kind: str, asked: dict[str, Any], at: str) -> Node | None:
        limits = {key: asked[key] for key in sorted(_BY_TYPE["number"] & asked.keys())}
        for key, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                raise FormError(f"{at}/{key}: expected a number")
        if not limits:
            return None
        self._work.spend(3000)
        try:
            return numbers_in_range(limits, kind == "integer")
        except FormError as error:
            raise FormError(f"{at}/{min(limits)}: {error}") from None


def _is_harmless(key: str, value: Any, schema: dict[str, Any]) -> bool:
    if key not in _HARMLESS or value is not _HARMLESS[key]:
        return False
    # Without properties an object may have any.
    return key != "unevaluatedProperties" or bool(schema.get("properties"))


def _escaped(name: str) -> str:
    """A part of a path, so that different parts of a schema have different paths."""
    return name.replace("~", "~0").replace("/", "~1")


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is no number")


def _types_of(asked: dict[str, Any], at: str) -> list[str]:
    """The types that a value may have."""
    given = asked.get("type")
    if given is None:
        found = [one for one, keys in _BY_TYPE.items() if keys & asked.keys()]
        if "enum" in asked or "const" in asked:
            return []
        if found not in (["object"], ["array"], ["string"]):
            raise FormError(f"{at} has no type; {min(asked)} alone is not served")
        return found
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not types:
        raise FormError(f"{at}/type: expected a name or a list of names")
    for one in types:
        if not isinstance(one, str) or one not in _BY_TYPE:
            known = ", ".join(_BY_TYPE)
            raise FormError(f"{at}/type is {one!r}; expected one of {known}")
    return types


def _bounds(
    asked: dict[str, Any], low: str, high: str, at: str
) -> tuple[int, int | None]:
    least, most = asked.get(low, 0), asked.get(high)
    for key, value in ((low, least), (high, most)):
        is_given = value is not None or key == low
        if is_given and (type(value) is not int or value < 0):
            raise FormError(f"{at}/{key}: expected an integer, 0 or more")
    if most is not None and most < least:
        raise FormError(f"{at}: {low} is above {high}")
    return least, most


def _has_type(value: Any, kind: str) -> bool:
    if kind in ("integer", "number"):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        return is_number and (kind == "number" or value == int(value))
    types = {"object": dict, "array": list, "string": str, "boolean": bool}
    return value is None if kind == "null" else isinstance(value, types[kind])


def _differ(
    one: tuple[str, dict[str, list[str]]], other: tuple[str, dict[str, list[str]]]
) -> bool:
    if one[0] != other[0]:
        return {one[0], other[0]} != {"integer", "number"}
    shared = one[1].keys() & other[1].keys()
    return any(not set(one[1][name]) & set(other[1][name]) for name in shared)
