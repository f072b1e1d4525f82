"""The size of a soak, and its table: what was measured, its bound, whether it held."""

from __future__ import annotations

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

MINUTES_OF_ALL = 20
"""Minutes of the soak whose numbers are those of the whole counts."""


@dataclass(frozen=True)
class Budget:
    """The size of a soak.

    Attributes:
        minutes: of all of it, about, on a machine that does nothing else.
        seed: of all random choices.
    """

    minutes: float
    seed: int

    @property
    def is_short(self) -> bool:
        """True for the run of ``make test``."""
        return self.minutes < 1

    def seconds(self, share: float, least: float = 2) -> float:
        """A share of the minutes, on one of the two servers."""
        return max(least, 60 * self.minutes * share / 2)

    def fixed(self, seconds: float) -> float:
        """Seconds that do not grow with the minutes; less in the short run."""
        return max(0.5, seconds / 6) if self.is_short else seconds

    def count(self, num: int) -> int:
        """A part of a count of 20 minutes, on one of the two servers."""
        return max(40, round(num * min(1, self.minutes / MINUTES_OF_ALL) / 2))


@dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        server: the server it was made on.
        bound: in words; empty where none holds.
    """

    server: str
    phase: str
    measure: str
    value: float | str
    bound: str
    ok: bool

    def markdown(self) -> str:
        value = str(self.value)
        if isinstance(self.value, int | float) and not isinstance(self.value, bool):
            value = f"{self.value:,}"
        state = "ok" if self.ok else "FAILED"
        end = state if self.bound else ""
        return f"| {self.phase} | {self.measure} | {value} | {self.bound} | {end} |"


@dataclass
class Phase:
    """The rows of one phase."""

    server: str
    name: str
    rows: list[Row] = field(default_factory=list)

    def note(self, measure: str, value: float | str) -> None:
        self._add(measure, value, "", True)

    def at_most(self, measure: str, value: float, bound: float) -> None:
        self._add(
            measure, value, f"at most {bound:,g}" if bound else "0", value <= bound
        )

    def at_least(self, measure: str, value: float, bound: float) -> None:
        self._add(measure, value, f"at least {bound:,g}", value >= bound)

    def equal(self, measure: str, value: float | str, expected: float | str) -> None:
        self._add(measure, value, str(expected), value == expected)

    def _add(self, measure: str, value: float | str, bound: str, ok: bool) -> None:
        self.rows.append(Row(self.server, self.name, measure, value, bound, ok))


@dataclass
class Table:
    """All rows, and what the soak ran on."""

    command: str
    facts: dict[str, Any] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)

    @contextmanager
    def phase(self, server: str, name: str) -> Iterator[Phase]:
        """Rows of one phase. An error in it is a row too.

        Raises:
            AssertionError: a row is out of its bound.
        """
        phase = Phase(server, name)
        try:
            yield phase
        except Exception as error:
            phase.equal(
                "it ended with", f"{type(error).__name__}: {error}"[:200], "no error"
            )
            raise
        finally:
            self.rows += phase.rows
        failed = [row for row in phase.rows if not row.ok]
        assert not failed, "\n".join(row.markdown() for row in failed)

    @property
    def ok(self) -> bool:
        return all(row.ok for row in self.rows)

    def markdown(self, date: str) -> str:
        """The report, with a table for each server."""
        lines = [
            f"# Soak, {date}",
            "",
            f"`{self.command}`. {versions()}.",
            f"Machine: {machine()}.",
            *(f"{name}: {value}." for name, value in self.facts.items()),
        ]
        for server in dict.fromkeys(row.server for row in self.rows):
            lines += ["", f"## {server}", ""]
            lines += ["| Phase | Measured | Value | Bound | |", "|---|---|---|---|---|"]
            lines += [row.markdown() for row in self.rows if row.server == server]
        failed = sum(not row.ok for row in self.rows)
        bounded = sum(bool(row.bound) for row in self.rows)
        lines += ["", f"{bounded} bounds, {failed} of them FAILED.", ""]
        return "\n".join(lines)

    def write(self, folder: Path, date: str) -> None:
        """``soak.md`` and ``soak.json`` in a folder."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "soak.md").write_text(self.markdown(date))
        found = {
            "date": date,
            "command": self.command,
            "versions": versions(),
            "machine": machine(),
            **self.facts,
            "ok": self.ok,
            "rows": [asdict(row) for row in self.rows],
        }
        (folder / "soak.json").write_text(json.dumps(found, indent=1) + "\n")


def versions() -> str:
    names = ("sglang", "torch", "transformers")
    return ", ".join(f"{name} {version(name).split('+')[0]}" for name in names)


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    return (
        f"{platform.machine()}, {psutil.cpu_count()} cores, {memory:.0f} GiB of memory"
    )
