"""The printed text, the JSON file and the chart of a run."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmark.gsm8k.figures import WAYS, Summary, aup


@dataclass(frozen=True)
class Run:
    """One pass over the problems. ``label`` is its value in a sweep."""

    label: str | None
    seed: int | None
    settings: dict[str, Any]
    effective: dict[str, Any] | None
    summary: Summary

    @property
    def title(self) -> str:
        parts = [] if self.label is None else [self.label]
        parts += [] if self.seed is None else [f"seed {self.seed}"]
        return ", ".join(parts) or "all problems"


def _figure(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def text(run: Run) -> str:
    """The table of one run."""
    s = run.summary
    counted = "" if s.timed == s.problems else f" (of {s.timed} after the warm-up)"
    forwards = "not told by the server" if s.forwards is None else str(s.forwards)
    lines = [
        f"{run.title}",
        f"  accuracy        {100 * s.accuracy:.1f} % of {s.problems} "
        f"(95 %: {100 * s.accuracy_low:.1f} to {100 * s.accuracy_high:.1f})",
        f"  tokens          {s.tokens} visible, {s.canvas_tokens} canvas{counted}",
        f"  forwards        {forwards}",
        f"  TPF             {_figure(s.tokens_per_forward)}",
        f"  TPS             {s.tokens_per_second:.1f} over {s.seconds:.1f} s",
        f"  latency (s)     p50 {s.latency_p50:.3f}  p90 {s.latency_p90:.3f}  "
        f"p99 {s.latency_p99:.3f}",
        f"  {'as counted by':<16}{'tokens':>9}{'TPF':>8}{'TPS':>10}  what, over what",
    ]
    for name, rate in s.rates.items():
        way = WAYS[name]
        tokens = "-" if rate.tokens is None else str(rate.tokens)
        lines.append(
            f"  {name:<16}{tokens:>9}{_figure(rate.tokens_per_forward):>8}"
            f"{_figure(rate.tokens_per_second, 1):>10}  {way.note}, {way.clock}"
        )
    return "\n".join(lines)


def points(runs: Sequence[Run]) -> list[tuple[str, float, float]]:
    """(label, TPF, accuracy in %) of each value of a sweep, means over its seeds."""
    groups: dict[str, list[Summary]] = defaultdict(list)
    for run in runs:
        groups[run.label or "-"].append(run.summary)
    found = []
    for label, group in groups.items():
        steps = [s.tokens_per_forward for s in group if s.tokens_per_forward]
        if len(steps) == len(group):
            accuracy = 100 * mean(s.accuracy for s in group)
            found.append((label, mean(steps), accuracy))
    return found


def sweep_text(runs: Sequence[Run], best: float | None) -> str | None:
    """The spread over seeds, and the AUP of a sweep."""
    lines = []
    groups: dict[str, list[float]] = defaultdict(list)
    for run in runs:
        groups[run.label or "all problems"].append(100 * run.summary.accuracy)
    for label, values in groups.items():
        if len(values) > 1:
            lines.append(
                f"{label}: accuracy over {len(values)} seeds {mean(values):.1f} "
                f"± {stdev(values):.1f} % (standard deviation)"
            )
    if len(groups) > 1:
        area = sweep_aup(runs, best)
        of = "the sweep's own best" if best is None else f"{best:g} %"
        lines.append(
            "AUP: - (the server does not tell its forwards)"
            if area is None
            else f"AUP {area:.1f} (best accuracy: {of})"
        )
    return "\n".join(lines) or None


def sweep_aup(runs: Sequence[Run], best: float | None) -> float | None:
    drawn = [(tpf, accuracy) for _, tpf, accuracy in points(runs)]
    labels = {run.label for run in runs}
    return aup(drawn, best) if len(drawn) == len(labels) > 1 else None


def write_json(path: Path, runs: Sequence[Run], best: float | None) -> None:
    body = {"runs": [asdict(run) for run in runs], "aup": sweep_aup(runs, best)}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def draw(path: Path, runs: Sequence[Run], title: str) -> None:
    """Draw accuracy against TPF, one labelled point for each value of a sweep."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    drawn = sorted(points(runs), key=lambda point: point[1])
    spans: dict[str, tuple[float, float]] = {}
    for run in runs:
        # Several seeds have no common interval, so only a single seed gets a bar.
        label = run.label or "-"
        again = label in spans
        interval = (100 * run.summary.accuracy_low, 100 * run.summary.accuracy_high)
        spans[label] = (0, 0) if again else interval
    figure, axes = pyplot.subplots(figsize=(6, 4))
    axes.plot([x for _, x, _ in drawn], [y for _, _, y in drawn], marker="o")
    for label, x, y in drawn:
        low, high = spans[label]
        if high:
            axes.vlines(x, low, high, alpha=0.35, linewidth=2)
        value = label.partition("=")[2] or label
        axes.annotate(value, (x, y), xytext=(4, 5), textcoords="offset points")
    axes.set_xlabel("tokens per forward")
    axes.set_ylabel("accuracy (%)")
    axes.set_ylim(bottom=0, top=104)
    axes.set_title(title)
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
