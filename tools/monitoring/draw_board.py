"""Draws the board's panels from recorded scrapes. It needs matplotlib.

``python -m tools.monitoring.draw_board SCRAPES.json.gz PICTURE.png``.
"""

from __future__ import annotations

import argparse
import gzip
import json
from pathlib import Path
from typing import Any

from tools.monitoring.board import PANELS, Panel
from tools.monitoring.series import Scrape

_REACH = 5
_COLUMNS = 3


def load(file: Path) -> list[Scrape]:
    found = json.loads(gzip.decompress(file.read_bytes()))
    return [Scrape.of(one["seconds"], one["lines"]) for one in found]


def draw(scrapes: list[Scrape], picture: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = -(-len(PANELS) // _COLUMNS)
    pyplot.style.use("dark_background")
    figure, axes = pyplot.subplots(rows, _COLUMNS, figsize=(17, 3 * rows))
    for axis, panel in zip(axes.flat, PANELS, strict=False):
        _draw_panel(axis, panel, scrapes)
    for axis in axes.flat[len(PANELS) :]:
        axis.axis("off")
    figure.tight_layout()
    figure.savefig(picture, dpi=70)


def _draw_panel(axis: Any, panel: Panel, scrapes: list[Scrape]) -> None:
    for series in panel.series:
        for name, points in series.curves(scrapes, _REACH).items():
            axis.plot(*zip(*points, strict=True), label=name, linewidth=1.4)
    units = {"s": ", seconds", "percentunit": ", share", "cps": ", a second"}
    axis.set_title(panel.title + units.get(panel.unit, ""), fontsize=10, loc="left")
    axis.set_ylim(bottom=0)
    axis.set_xlim(0, scrapes[-1].seconds)
    axis.grid(alpha=0.2)
    axis.tick_params(labelsize=8)
    if axis.lines and any(line.get_label()[0] != "_" for line in axis.lines):
        axis.legend(fontsize=7, loc="upper left", framealpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scrapes", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    draw(load(args.scrapes), args.picture)


if __name__ == "__main__":
    main()
