"""``python -m sglang_dllm.models``: writes the tables of docs/checkpoints.md."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sglang_dllm.models.config_fields import KINDS, TABLES, Only, Read, Rule, Table

DOCUMENT = Path(__file__).parents[3] / "docs" / "checkpoints.md"
START, END = "<!-- tables: generated -->", "<!-- end of the tables -->"


def render() -> str:
    """The tables of all families, without what all have in common."""
    families: dict[int, tuple[Table, list[str]]] = {}
    for architecture, table in TABLES.items():
        families.setdefault(id(table), (table, []))[1].append(architecture)
    tables = [table.rules for table, _ in families.values()]
    common = {
        name: rule
        for name, rule in tables[0].items()
        if all(rules.get(name) == rule for rules in tables)
    }
    parts = ["### All families", *_rows(common)]
    for table, names in families.values():
        parts += ["", "### " + ", ".join(f"`{name}`" for name in names), ""]
        kinds = ", ".join(f"`{kind}`" for kind in table.rope_kinds)
        parts.append(
            "`rope_theta` must be there."
            if table.needs_theta
            else f"`rope_theta` is {table.theta:g} where the file has none."
        )
        parts.append(f"The types of `rope_scaling` are {kinds}.")
        others = {n: rule for n, rule in table.rules.items() if n not in common}
        parts += _rows(others)
    return "\n".join(parts) + "\n"


def _rows(rules: dict[str, Rule]) -> Iterator[str]:
    yield ""
    yield "| Field | Rule | Default or reason |"
    yield "|---|---|---|"
    order = (Read, Only)
    for kind in (*order, None):
        for name, rule in sorted(rules.items()):
            if type(rule) is kind or (kind is None and type(rule) not in order):
                yield f"| `{name}` | {_rule(rule)} |"


def _rule(rule: Rule) -> str:
    if isinstance(rule, Read):
        default = rule.says or f"`{_shown(rule.default)}`"
        default = "none: must be there" if rule.is_needed else default
        return f"read: {KINDS[rule.kind][0]} | {default}"
    if isinstance(rule, Only):
        values = " or ".join(f"`{_shown(value)}`" for value in rule.values)
        return f"refused unless {values} | {rule.other}"
    return f"ignored | {rule.why}"


def _shown(value: Any) -> str:
    if callable(value):
        return str(value.__doc__)
    return value if isinstance(value, str) else json.dumps(value)


def written(text: str) -> str:
    """A document with the tables between its two marks."""
    head, _, rest = text.partition(START)
    _, _, tail = rest.partition(END)
    return f"{head}{START}\n\n{render()}\n{END}{tail}"


if __name__ == "__main__":
    DOCUMENT.write_text(written(DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
