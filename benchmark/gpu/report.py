"""The results of a run: a JSON file, Markdown tables and the goals."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmark.gpu.roofline import TPFS
from benchmark.gpu.shapes import FULL_512, WINDOW_64, WINDOW_64_X16

Row = dict[str, Any]

SHOWN_KERNELS = 8


_COMPARE = {"<=": operator.le, "<": operator.lt, ">=": operator.ge}


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of one line. ``sign`` is the side of the bound."""

    name: str
    part: str
    line: str
    figure: Callable[[Row], float]
    bound: float
    unit: str
    sign: str = "<="

    def is_met(self, value: float) -> bool:
        return bool(_COMPARE[self.sign](value, self.bound))


def _ms(row: Row) -> float:
    return float(row["ms"])


def _tps(row: Row) -> float:
    return float(row["tps"][str(TPFS[0])])


def _outside(row: Row) -> float:
    return float(row["outside"]) * 100


GOALS = (
    Goal(FULL_512.name, "steps", FULL_512.name, _ms, 11.6, "ms"),
    Goal(WINDOW_64.name, "steps", WINDOW_64.name, _ms, 4.2, "ms"),
    Goal(
        f"{WINDOW_64_X16.name}, all together at TPF {TPFS[0]}",
        "steps",
        WINDOW_64_X16.name,
        _tps,
        6000,
        "TPS",
        ">=",
    ),
    *(
        Goal(
            f"outside the model's kernels, {case.name}",
            "outside",
            case.name,
            _outside,
            5,
            "%",
            "<",
        )
        for case in (FULL_512, WINDOW_64, WINDOW_64_X16)
    ),
)
"""The goals hold for one H200 and LLaDA-8B's shape."""


class Results:
    """The results so far. Every ``add`` writes both files.

    Attributes:
        content: the facts of the run, a list of lines under each of ``machine``,
            ``steps``, ``kernels`` and ``outside``, and reasons under ``skipped`` and
            ``errors``.
    """

    def __init__(self, out: Path, facts: Row, has_goals: bool) -> None:
        self.out = out
        self.has_goals = has_goals
        lists = ("machine", "kernels", "steps", "outside", "skipped", "errors")
        self.content: Row = {**facts, "goals": [], **{name: [] for name in lists}}
        self.save()

    def add(self, part: str, row: Row) -> None:
        self.content[part].append(row)
        print(f"{part}: {brief(part, row)}", flush=True)
        self.save()

    def save(self) -> None:
        self.content["goals"] = judge(self.content, self.has_goals)
        text = json.dumps(self.content, indent=1) + "\n"
        for file, written in [
            (self.out, text),
            (self.out.with_suffix(".md"), markdown(self.content)),
        ]:
            # A run that is killed must leave complete files, so they are renamed.
            partial = file.with_name(file.name + ".part")
            partial.write_text(written, encoding="utf-8")
            partial.replace(file)


def judge(content: Row, has_goals: bool) -> list[Row]:
    """The verdict on each goal: met, missed or not measured."""
    judged = []
    for goal in GOALS:
        rows = {row["name"]: row for row in content[goal.part]}
        value, verdict = None, "not measured"
        if has_goals and goal.line in rows:
            value = goal.figure(rows[goal.line])
            verdict = "met" if goal.is_met(value) else "missed"
        judged.append(
            {
                "goal": goal.name,
                "bound": f"{goal.sign} {goal.bound:g} {goal.unit}",
                "found": value,
                "verdict": verdict,
            }
        )
    return judged


def brief(part: str, row: Row) -> str:
    """One line for the terminal."""
    if part in ("skipped", "errors"):
        return f"{row['name']}: {row['reason']}"
    if part == "machine":
        return f"{row['name']} {row['value']:.4g} {row['unit']}"
    if part == "outside":
        return f"{row['name']} {row['outside'] * 100:.1f} % of {row['step_ms']:.3f} ms"
    return f"{row['name']} {row['ms']:.4f} ms, {row['of_floor'] * 100:.0f} % of floor"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with aligned columns, which a terminal shows well too.

    The first column is aligned to the left, the figures to the right.
    """
    columns = list(zip(head, *rows, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        texts = [first[0].ljust(first[1])] + [text.rjust(w) for text, w in others]
        return "| " + " | ".join(texts) + " |"

    rules = ["-" * widths[0]] + ["-" * (width - 1) + ":" for width in widths[1:]]
    return "\n".join([line(head), line(rules), *map(line, rows)])


Column = tuple[str, Callable[[Row], str]]
"""A column's head, and its text of a line."""


def _text(head: str, key: str) -> Column:
    return head, lambda row: str(row[key])


def _number(head: str, key: str, form: str = ".3f") -> Column:
    return head, lambda row: "-" if row[key] is None else format(row[key], form)


def _percent(head: str, key: str, form: str = ".0f") -> Column:
    return head, lambda row: f"{format(row[key] * 100, form)} %"


def _tps_at(tpf: str) -> Column:
    return f"TPS at {tpf}", lambda row: f"{row['tps'][tpf]:.0f}"


COLUMNS: dict[str, tuple[str, list[Column]]] = {
    "goals": (
        "Goals",
        [
            _text("goal", "goal"),
            _text("bound", "bound"),
            _number("found", "found", ".4g"),
            _text("verdict", "verdict"),
        ],
    ),
    "machine": (
        "Machine",
        [
            _text("rate", "name"),
            _number("measured", "value", ".4g"),
            _text("unit", "unit"),
        ],
    ),
    "steps": (
        "Steps through the server",
        [
            _text("forward", "name"),
            _number("ms", "ms"),
            _number("min", "min_ms"),
            _number("max", "max_ms"),
            _number("compute ms", "compute_ms"),
            _number("memory ms", "memory_ms"),
            _percent("of floor", "of_floor"),
            *(_tps_at(str(tpf)) for tpf in TPFS),
            ("pairs", lambda row: f"{row['pairs']} x {row['long'] - row['short']}"),
        ],
    ),
    "outside": (
        "Outside the model's kernels",
        [
            _text("forward", "name"),
            _number("step ms", "step_ms"),
            _number("model's kernels", "model_kernels_ms"),
            _number("other kernels", "other_kernels_ms"),
            _number("gaps", "gaps_ms"),
            _percent("outside", "outside", ".1f"),
        ],
    ),
    "kernels": (
        "Parts alone",
        [
            _text("part", "name"),
            _number("ms", "ms", ".4f"),
            _number("floor ms", "floor_ms", ".4f"),
            _percent("of floor", "of_floor"),
        ],
    ),
    "skipped": ("Skipped", [_text("part", "name"), _text("reason", "reason")]),
    "errors": ("Errors", [_text("part", "name"), _text("reason", "reason")]),
}
"""Title and columns of each part of the report."""


def markdown(content: Row) -> str:
    """The whole report."""
    facts = {
        key: value
        for key, value in content.items()
        if not isinstance(value, list | dict)
    }
    lines = [
        f"- {key}: {value}" for key, value in (facts | content["software"]).items()
    ]
    blocks = ["# GPU benchmark", "\n".join(lines)]
    for part, (title, columns) in COLUMNS.items():
        rows = content[part]
        if rows:
            heads = [head for head, _ in columns]
            cells = [[text(row) for _, text in columns] for row in rows]
            blocks += [f"## {title}", table(heads, cells)]
        if part == "outside":
            blocks += [_kernels_of(row, w) for row in rows for w in ("model", "other")]
    return "\n\n".join(blocks) + "\n"


def _kernels_of(row: Row, whose: str) -> str:
    lines = list(row[f"{whose}_kernels"].items())[:SHOWN_KERNELS]
    shown = "\n".join(f"- {ms:.4f}: `{name[:90]}`" for name, ms in lines)
    return f"{row['name']}, {whose} kernels, ms a forward:\n\n{shown}"
