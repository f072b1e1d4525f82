"""The benchmarks that call parts of the engine find these parts and time something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SMALL = {
    "round_cost": "--canvases 2 --steps-per-round 2 --max-new-tokens 8",
    "strip_cost": "--positions 8",
    "peak_memory": "--batch 1 --canvas-len 64 --vocab-size 60000 --case FastDLLM",
}


def figures_of(name: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", f"benchmark.speed.{name}", *SMALL[name].split()]
    done = subprocess.run(
        [*command, "--json", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-1000:]
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


@pytest.mark.parametrize("name", SMALL)
def test_every_part_takes_something(name: str, tmp_path: Path) -> None:
    figures = figures_of(name, tmp_path / "figures.json")
    if name == "round_cost":
        (kind,) = figures["kinds"]
        assert all(kind["ms"][part] > 0 for part in ("model", "head", "measure"))
        assert 0 < kind["outside_share"] < 1
    elif name == "strip_cost":
        for strip in figures["strips"]:
            assert strip["positions"] == 8 and strip["ms"] > 0 and strip["ratio"] > 0
    else:
        stages = figures["cases"]["FastDLLM"]["stages"]
        assert all(stages[stage] > 0 for stage in ("head", "measure"))
