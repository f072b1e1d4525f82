"""`make bench`: the goals of the speed benchmarks, each met or missed.

    python -m benchmark.goals [--only NAME ...] [--json OUT]

Each benchmark is a process of its own. A server is several processes and the client is
one more, so each process gets one thread unless OMP_NUM_THREADS is set. The exit status
is 1 if a benchmark failed. A missed goal does not change it.
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

from benchmark.command import Figures, parser_of, run_command

ROOT = Path(__file__).parents[1]
ACCURACY_POINTS = 2
GIB = 2**30


@dataclass(frozen=True)
class Goal:
    """A bound on one figure of a benchmark.

    Attributes:
        measured: reads the figure, as a number and as the table shows it.
        least, most: the bound. One of them is set.
    """

    name: str
    script: str
    measured: Callable[[Figures], tuple[float, str]]
    least: float | None = None
    most: float | None = None

    @property
    def wanted(self) -> str:
        return f">= {self.least:g}" if self.least is not None else f"< {self.most:g}"

    def is_met(self, value: float) -> bool:
        if self.least is not None:
            return value >= self.least
        assert self.most is not None
        return value < self.most


def _ratio(value: float) -> tuple[float, str]:
    return value, f"{value:.2f}"


def _percent(share: float) -> tuple[float, str]:
    return 100 * share, f"{100 * share:.1f}"


def best_cache(figures: Figures) -> tuple[str, Figures]:
    """The faster of the two caches that the goals are about."""
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
        "compare_plain_loop",
        lambda f: _ratio(f["server"]["1"]["throughput_ratio"]),
        least=1.0,
    ),
    Goal(
        "server / bare model, 16 at once",
        "server_bound",
        lambda f: _ratio(f["speed"]),
        least=0.9,
    ),
    Goal(
        "the same per token computed",
        "server_bound",
        lambda f: _ratio(f["speed_per_token"]),
        least=0.9,
    ),
    Goal("cache / none, speed", "cache_speed", _cache_speed, least=3.0),
    Goal(
        "cache - none, points of accuracy",
        "cache_speed",
        _cache_accuracy,
        least=-ACCURACY_POINTS,
    ),
    Goal(
        "scheduler process outside the model, % CPU",
        "server_bound",
        lambda f: _percent(f["outside_share"]),
        most=10.0,
    ),
    Goal("round outside model and head, % time", "round_cost", _round_share, most=10.0),
    Goal("peak above weights and pool, GiB", "peak_memory", _peak, most=1.0),
    Goal(
        "forward with a schema / without, 1 at once",
        "structure",
        lambda f: _ratio(f["forward 1"]),
        most=1.25,
    ),
    Goal(
        "the same, 16 at once",
        "structure",
        lambda f: _ratio(f["forward 16"]),
        most=1.25,
    ),
)

COMMANDS: dict[str, tuple[str, ...]] = {
    "compare_plain_loop": (),
    "server_bound": (),
    "cache_speed": ("--num", "10"),
    "round_cost": ("--max-new-tokens", "32"),
    "peak_memory": ("--case", "Dream", "Credit, temperature 1"),
    "structure": (),
}
"""Arguments that keep `make bench` within some minutes on two cores."""


def table(figures: Mapping[str, Figures], goals: Sequence[Goal] = GOALS) -> str:
    """One line a goal. A goal without figures has dashes."""
    lines = [f"{'':<45}{'goal':>8}  {'met':<5}measured"]
    for goal in goals:
        met = text = "-"
        if goal.script in figures:
            value, text = goal.measured(figures[goal.script])
            met = "yes" if goal.is_met(value) else "no"
        lines.append(f"{goal.name:<45}{goal.wanted:>8}  {met:<5}{text}")
    return "\n".join(lines)


def run(script: str, json_path: Path) -> Figures | None:
    """The figures of a benchmark, or None if it failed. Its table is not printed."""
    command = [sys.executable, "-m", f"benchmark.speed.{script}", *COMMANDS[script]]
    began = time.perf_counter()
    env = {"OMP_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(
        [*command, "--json", str(json_path)],
        cwd=ROOT,
        env=env,
        stdout=subprocess.DEVNULL,
    )
    try:
        status = process.wait()
    finally:
        process.terminate()  # a benchmark that goes on would keep its server
        process.wait()
    print(f"{script}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    if status or not json_path.exists():
        return None
    figures: Figures = json.loads(json_path.read_text())
    return figures


def build_parser() -> argparse.ArgumentParser:
    parser = parser_of(__doc__)
    parser.add_argument("--only", nargs="+", choices=tuple(COMMANDS), metavar="NAME")
    return parser


def measure(args: argparse.Namespace) -> dict[str, Figures | None]:
    """The figures of every benchmark, None for one that failed."""
    with tempfile.TemporaryDirectory() as folder:
        return {
            script: run(script, Path(folder) / f"{script}.json")
            for script in args.only or COMMANDS
        }


def show(figures: dict[str, Figures | None]) -> str:
    return table({script: found for script, found in figures.items() if found})


def problem(figures: dict[str, Figures | None]) -> str | None:
    failed = [script for script, found in figures.items() if found is None]
    return f"failed: {', '.join(failed)}" if failed else None


if __name__ == "__main__":
    sys.exit(run_command(build_parser(), measure, show, problem))
