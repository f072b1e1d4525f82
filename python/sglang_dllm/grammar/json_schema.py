"""A JSON schema as the rules of a grammar: what they produce, the schema accepts.

The rules produce less than a schema accepts: properties come in the schema's order and
there are no others, patterns match whole strings. A keyword that the rules cannot
honour is refused by name, because an answer would be wrong without a word.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import xgrammar

from sglang_dllm.grammar import json_text
from sglang_dllm.grammar.ebnf import (
    Choice,
    Node,
    Repeat,
    Rule,
    Rules,
    Sequence,
    Text,
    read_rules,
)
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.regex import read_regex

MAX_SCHEMA_LENGTH = 65_536
"""Characters."""

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
_HARMLESS = {"uniqueItems": False, "unevaluatedProperties": False}
"""Values with which a keyword asks for nothing, or for what the rules do anyway."""

_DAY = (
    r"((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)"
    r"|02-(0[1-9]|1\d|2[0-8]))"
)
_DATE = rf"[1-9]\d{{3}}-{_DAY}"
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_BYTE = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
FORMATS: Mapping[str, str] = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": r"[0-9a-f]{8}-([0-9a-f]{4}-){3}[0-9a-f]{12}",
    "ipv4": rf"({_BYTE}\.){{3}}{_BYTE}",
    "email": r"[a-z0-9]+([._-][a-z0-9]+)*@[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+)+",
    "hostname": r"[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+(-[a-z0-9]+)*)*",
    "uri": r"https?://[a-z0-9]+(-[a-z0-9]+)*(\.[a-z0-9]+)+(/[A-Za-z0-9._~-]*)*",
}
"""The strings of a format; fewer than it allows."""


def read_schema(text: str) -> Rules:
    """The rules of a JSON schema.

    Raises:
        FormError: naming the place and the keyword that cannot be honoured.
    """
    if len(text) > MAX_SCHEMA_LENGTH:
        raise FormError(f"it has more than {MAX_SCHEMA_LENGTH} characters")
    try:
        schema = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is no JSON: {error}") from None
    reader = _Reader(schema)
    try:
        reader.rules["root"] = reader.value(schema, "#")
    except RecursionError:
        raise FormError("it is nested too deeply") from None
    return reader.rules


class _Reader:
    def __init__(self, root: Any) -> None:
        self.root = root
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
        if schema is True or schema == {}:
            return Rule("any")
        if not isinstance(schema, dict):
            raise FormError(f"{at} is {json.dumps(schema)[:40]}; expected a schema")
        asked = {
            key: value
            for key, value in schema.items()
            if key not in _NOTES
            and not key.startswith("x-")
            and not _is_harmless(key, value)
        }
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
            if key not in (served if "type" not in asked else known):
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
        if not isinstance(target, str) or not target.startswith("#"):
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
        return all(
            one is not None and other is not None and _differ(one, other)
            for index, one in enumerate(marks)
            for other in marks[:index]
        )

    def mark(self, schema: Any) -> tuple[str, dict[str, list[str]]] | None:
        """A schema's type, and the values that its required properties may have."""
        while isinstance(schema, dict) and isinstance(schema.get("$ref"), str):
            found = self.root
            for part in schema["$ref"].split("/")[1:]:
                found = found.get(part, {}) if isinstance(found, dict) else {}
            schema = found
        if not isinstance(schema, dict) or not isinstance(schema.get("type"), str):
            return None
        consts = {}
        for name in schema.get("required", ()):
            one = schema.get("properties", {}).get(name, {})
            values = [one["const"]] if "const" in one else one.get("enum")
            if values is not None:
                consts[name] = [json.dumps(value) for value in values]
        return schema["type"], consts

    def fixed(self, asked: dict[str, Any], types: list[str], at: str) -> Node:
        values = asked.get("enum", [asked.get("const")])
        if not isinstance(values, list):
            raise FormError(f"{at}/enum: expected a list")
        if "const" in asked:
            values = [value for value in values if value == asked["const"]]
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
            if name not in properties:
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
                    self.value(schema, f"{at}/properties/{name}"),
                )
            )
            for name, schema in properties.items()
        ]
        needed = [name in required for name in properties]
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
            return json_text.string(json_text.content(read_regex(pattern)))
        except FormError as error:
            raise FormError(f"{at}/pattern: {error}") from None

    def integer(self, asked: dict[str, Any], at: str) -> Node:
        return self.in_range("integer", asked, at) or json_text.INTEGER

    def number(self, asked: dict[str, Any], at: str) -> Node:
        return self.in_range("number", asked, at) or json_text.NUMBER

    def in_range(self, kind: str, asked: dict[str, Any], at: str) -> Node | None:
        """The numbers of a range, as xgrammar writes them."""
        limits = {key: asked[key] for key in sorted(_BY_TYPE[kind] & asked.keys())}
        if not limits:
            return None
        for key, limit in limits.items():
            if isinstance(limit, bool) or not isinstance(limit, int | float):
                raise FormError(f"{at}/{key}: expected a number")
        try:
            found = xgrammar.Grammar.from_json_schema(
                json.dumps({"type": kind, **limits}), any_whitespace=False
            )
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0].rpartition(": ")[2]
            raise FormError(f"{at}/{min(limits)}: {reason}") from None
        prefix = f"{at} {kind}"
        for name, node in read_rules(str(found)).items():
            self.rules[f"{prefix} {name}"] = _renamed(node, prefix)
        return Rule(f"{prefix} root")


def _is_harmless(key: str, value: Any) -> bool:
    return key in _HARMLESS and value is _HARMLESS[key]


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
        if one not in _BY_TYPE:
            known = ", ".join(_BY_TYPE)
            raise FormError(f"{at}/type is {one!r}; expected one of {known}")
    return types


def _bounds(
    asked: dict[str, Any], low: str, high: str, at: str
) -> tuple[int, int | None]:
    least, most = asked.get(low, 0), asked.get(high)
    for key, value in ((low, least), (high, most)):
        if value is not None and (type(value) is not int or value < 0):
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


def _renamed(node: Node, prefix: str) -> Node:
    match node:
        case Rule(name):
            return Rule(f"{prefix} {name}")
        case Sequence(parts):
            return Sequence(tuple(_renamed(part, prefix) for part in parts))
        case Choice(parts):
            return Choice(tuple(_renamed(part, prefix) for part in parts))
        case Repeat(part, least, most):
            return Repeat(_renamed(part, prefix), least, most)
        case _:
            return node
