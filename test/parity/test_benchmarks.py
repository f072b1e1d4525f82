"""The benchmarks that wrap parts of our code still find them, and time something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmark"
SMALL = {
    "round_cost.py": "--canvases 2 --steps-per-round 2 --max-new-tokens 8",
    "launch_gap.py": "--canvases 2 --max-new-tokens 32",
    "peak_memory.py": "--batch 1 --canvas-len 64 --vocab-size 60000 --case FastDLLM",
}


def figures_of(name: str, path: Path) -> dict[str, Any]:
    command = [sys.executable, str(BENCHMARK / name), *SMALL[name].split()]
    done = subprocess.run(
        [*command, "--json", str(path)], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-1000:]
    figures: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return figures


@pytest.mark.parametrize("name", SMALL)
def test_every_part_takes_something(name: str, tmp_path: Path) -> None:
    figures = figures_of(name, tmp_path / "figures.json")
    if name == "round_cost.py":
        (kind,) = figures["kinds"]
        assert all(kind["ms"][part] > 0 for part in ("model", "head", "measure"))
        assert 0 < kind["outside_share"] < 1
    elif name == "launch_gap.py":
        (kind,) = figures["kinds"]
        assert all(kind["us"][way] > 0 for way in ("staged", "not"))
        # Views, where inputs are in place; to put them there takes operations.
        assert kind["calls"]["staged"] < 5 < kind["calls"]["not"]
    else:
        stages = figures["cases"]["FastDLLM"]["stages"]
        assert all(stages[stage] > 0 for stage in ("head", "measure"))
