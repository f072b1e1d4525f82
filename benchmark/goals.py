"""`make bench`: every speed benchmark once, then the goals and what was measured.

    python benchmark/goals.py [--only NAME ...] [--json OUT]

Each benchmark is a process of its own, with one thread where nothing else is asked for
(OMP_NUM_THREADS): a server is several processes, and so is its client. The exit status
is 1 where a benchmark failed; a goal that is missed only says so.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gsm8k import OneLineParser

HERE = Path(__file__).parent
ACCURACY_POINTS = 2
GIB = 2**30

Figures = dict[str, Any]


@dataclass(frozen=True)
class Goal:
    """What one benchmark's figures should say.

    Attributes:
        measured: the number that is compared, and how the table shows it.
        least, most: bounds of it.
    """

    what: str
    script: str
    measured: Callable[[Figures], tuple[float, str]]
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"< {self.most:g}"

    def met(self, value: float) -> bool:
        if self.least is not None:
            return value >= self.least
        assert self.most is not None
        return value < self.most


def _ratio(value: float) -> tuple[float, str]:
    return value, f"{value:.2f}"


def _percent(share: float) -> tuple[float, str]:
    return 100 * share, f"{100 * share:.1f}"


def best_cache(figures: Figures) -> tuple[str, Figures]:
    """The faster of those the goal names."""
    rows = {name: figures["caches"][name] for name in ("dual", "vicinity")}
    name = max(rows, key=lambda one: float(rows[one]["speed"]))
    return name, rows[name]


def _cache_speed(figures: Figures) -> tuple[float, str]:
    name, row = best_cache(figures)
    return row["speed"], f"{row['speed']:.2f} ({name})"


def _cache_accuracy(figures: Figures) -> tuple[float, str]:
    name, row = best_cache(figures)
    points = 100 * row["accuracy_change"]
    return points, f"{points:+.1f} ({name}, {figures['problems']} problems)"


def _round_share(figures: Figures) -> tuple[float, str]:
    row = max(figures["kinds"], key=lambda one: (one["canvases"], one["steps"]))
    return _percent(row["outside_share"])


def _peak(figures: Figures) -> tuple[float, str]:
    cases = figures["cases"]
    worst = max(cases, key=lambda name: float(cases[name]["peak"]))
    peak = figures["peak"] / GIB
    return peak, f"{peak:.2f} ({worst})"


GOALS = (
    Goal(
        "server / plain loop, tokens/s, 1 at once",
        "compare_reference.py",
        lambda f: _ratio(f["server"]["1"]["throughput_ratio"]),
        least=1.0,
    ),
    Goal(
        "server / bare model, 16 at once",
        "server_bound.py",
        lambda f: _ratio(f["speed"]),
        least=0.9,
    ),
    Goal(
        "the same per canvas row computed",
        "server_bound.py",
        lambda f: _ratio(f["speed_per_row"]),
        least=0.9,
    ),
    Goal("cache / none, speed", "cache_speed.py", _cache_speed, least=3.0),
    Goal(
        "cache - none, points of accuracy",
        "cache_speed.py",
        _cache_accuracy,
        least=-ACCURACY_POINTS,
    ),
    Goal(
        "scheduler process outside the model, % CPU",
        "server_bound.py",
        lambda f: _percent(f["outside_share"]),
        most=10.0,
    ),
    Goal(
        "round outside model and head, % time",
        "round_cost.py",
        _round_share,
        most=10.0,
    ),
    Goal("peak above weights and pool, GiB", "peak_memory.py", _peak, most=1.0),
)

COMMANDS: dict[str, tuple[str, ...]] = {
    "compare_reference.py": (),
    "server_bound.py": (),
    "cache_speed.py": ("--num", "10"),
    "round_cost.py": ("--max-new-tokens", "32"),
    "peak_memory.py": ("--case", "Dream", "Credit, temperature 1"),
    "attention_cost.py": (),
}
"""Arguments that keep `make bench` within some minutes on two cores."""

NO_FIGURES = ("attention_cost.py",)


def table(figures: Mapping[str, Figures], goals: Sequence[Goal] = GOALS) -> str:
    """One line a goal; of a benchmark without figures nothing was measured."""
    lines = [f"{'':<45}{'goal':>8}  {'met':<5}measured"]
    for goal in goals:
        if goal.script in figures:
            value, text = goal.measured(figures[goal.script])
            met = "yes" if goal.met(value) else "no"
        else:
            met, text = "-", "-"
        lines.append(f"{goal.what:<45}{goal.wanted:>8}  {met:<5}{text}")
    return "\n".join(lines)


def run(script: str, json_path: Path) -> Figures | None:
    """A benchmark's figures; it has printed its own table. None where it failed."""
    command = [sys.executable, str(HERE / script), *COMMANDS[script]]
    if script not in NO_FIGURES:
        command += ["--json", str(json_path)]
    print(f"\n== {script} {' '.join(COMMANDS[script])}", flush=True)
    began = time.perf_counter()
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    status = subprocess.run(command, env=env).returncode
    print(f"({time.perf_counter() - began:.0f} s)", flush=True)
    if script in NO_FIGURES:
        return {} if status == 0 else None
    if not json_path.exists():
        return None
    figures: Figures = json.loads(json_path.read_text())
    return figures | {"exit_status": status}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=tuple(COMMANDS), metavar="NAME")
    parser.add_argument("--json", type=Path, help="all figures")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    args = build_parser().parse_args(arguments)
    figures: dict[str, Figures] = {}
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        for script in args.only or COMMANDS:
            found = run(script, Path(folder) / f"{script}.json")
            if found is not None:
                figures[script] = found
            if found is None or found.get("exit_status", 0):
                failed.append(script)
    print(f"\n{table(figures)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if failed:
        print(f"goals.py: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
