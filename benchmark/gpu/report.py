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


def markdown(content: Row) -> str:
    """The whole report."""
    facts = {
        key: value
        for key, value in content.items()
        if not isinstance(value, list | dict)
    }
    facts |= content["software"]
    blocks = ["# GPU benchmark", _facts(facts)]
    for title, part, render in [
        ("Goals", "goals", _goals),
        ("Machine", "machine", _machine),
        ("Steps through the server", "steps", _steps),
        ("Outside the model's kernels", "outside", _outside_table),
        ("Parts alone", "kernels", _kernels),
        ("Skipped", "skipped", _reasons),
        ("Errors", "errors", _reasons),
    ]:
        if content[part]:
            blocks += [f"## {title}", render(content[part])]
    return "\n\n".join(blocks) + "\n"


def _facts(facts: Row) -> str:
    return "\n".join(f"- {key}: {value}" for key, value in facts.items())


def _goals(rows: Sequence[Row]) -> str:
    return table(
        ["goal", "bound", "found", "verdict"],
        [
            [
                row["goal"],
                row["bound"],
                "-" if row["found"] is None else f"{row['found']:.4g}",
                row["verdict"],
            ]
            for row in rows
        ],
    )


def _machine(rows: Sequence[Row]) -> str:
    return table(
        ["rate", "measured", "unit"],
        [[row["name"], f"{row['value']:.4g}", row["unit"]] for row in rows],
    )


def _steps(rows: Sequence[Row]) -> str:
    tpfs = [str(tpf) for tpf in TPFS]
    head = ["forward", "ms", "min", "max", "compute ms", "memory ms", "of floor"]
    return table(
        [*head, *(f"TPS at {tpf}" for tpf in tpfs), "pairs"],
        [
            [
                row["name"],
                *(
                    f"{row[key]:.3f}"
                    for key in ("ms", "min_ms", "max_ms", "compute_ms", "memory_ms")
                ),
                f"{row['of_floor'] * 100:.0f} %",
                *(f"{row['tps'][tpf]:.0f}" for tpf in tpfs),
                f"{row['pairs']} x {row['long'] - row['short']}",
            ]
            for row in rows
        ],
    )


def _kernels(rows: Sequence[Row]) -> str:
    return table(
        ["part", "ms", "floor ms", "of floor"],
        [
            [
                row["name"],
                f"{row['ms']:.4f}",
                f"{row['floor_ms']:.4f}",
                f"{row['of_floor'] * 100:.0f} %",
            ]
            for row in rows
        ],
    )


def _outside_table(rows: Sequence[Row]) -> str:
    keys = ("step_ms", "model_kernels_ms", "other_kernels_ms", "gaps_ms")
    text = table(
        ["forward", "step ms", "model's kernels", "other kernels", "gaps", "outside"],
        [
            [
                row["name"],
                *(f"{row[key]:.3f}" for key in keys),
                f"{row['outside'] * 100:.1f} %",
            ]
            for row in rows
        ],
    )
    for row in rows:
        for whose in ("model", "other"):
            lines = list(row[f"{whose}_kernels"].items())[:SHOWN_KERNELS]
            shown = "\n".join(f"- {ms:.4f}: `{name[:90]}`" for name, ms in lines)
            text += f"\n\n{row['name']}, {whose} kernels, ms a forward:\n\n{shown}"
    return text


def _reasons(rows: Sequence[Row]) -> str:
    return "\n".join(f"- {row['name']}: {row['reason']}" for row in rows)
