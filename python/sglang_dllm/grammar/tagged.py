"""SGLang's structural tag: a JSON value between two fixed texts, as a tool call is."""

from __future__ import annotations

import json
from typing import Any

from sglang_dllm.grammar.ebnf import Choice, Node, Rule, Rules, Sequence, Text, renamed
from sglang_dllm.grammar.errors import FormError
from sglang_dllm.grammar.json_schema import read_schema
from sglang_dllm.grammar.work import Work


def read_tag(text: str, work: Work) -> Rules:
    """The rules of a structural tag: the answer is one of its structures, and no more.

    A tag that allows free text around its structures is refused: nothing would say
    where the text ends.

    Args:
        text: the JSON of ``{"structures": [{"begin", "schema", "end"}],
            "at_least_one": true}``.

    Raises:
        FormError: it has another shape, or a schema is refused.
    """
    try:
        tag = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormError(f"it is no JSON: {error}") from None
    structures = tag.get("structures") if isinstance(tag, dict) else None
    if not isinstance(structures, list) or not structures:
        raise FormError("expected structures: a list of at least 1 object")
    if tag.get("at_least_one") is not True:
        raise FormError(
            "expected at_least_one: true; free text around a structure is not served, "
            "as strict functions with tool_choice auto ask for it"
        )
    rules: Rules = {}
    for i, structure in enumerate(structures):
        rules |= _structure(structure, i, work)
    names = [f"structure {i}" for i in range(len(structures))]
    return {**rules, "root": Choice(tuple(map(Rule, names)))}


def _structure(structure: Any, number: int, work: Work) -> Rules:
    at = f"structures[{number}]"
    if not isinstance(structure, dict):
        raise FormError(f"{at}: expected an object with begin, schema and end")
    ends: list[Node] = []
    for key in ("begin", "end"):
        if not isinstance(structure.get(key), str):
            raise FormError(f"{at}.{key}: expected a string")
        ends.append(Text(structure[key]))
    try:
        rules = read_schema(json.dumps(structure.get("schema") or {}), work)
    except FormError as error:
        raise FormError(f"{at}.schema: {error}") from None
    # The schemas may have rules of one name.
    rules = renamed(rules, f"{number} ")
    rules[f"structure {number}"] = Sequence((ends[0], Rule(f"{number} root"), ends[1]))
    return rules
