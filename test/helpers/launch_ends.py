"""How launches end that are about to fail."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmark.server import SGLANG
from helpers.warm_start import Fork

SECONDS = 150
"""A launch that takes longer is killed and has the status -9."""


def ends(launches: Iterable[Sequence[object]]) -> list[tuple[int, str]]:
    """The exit status and the output of ``sglang serve`` with each list of words."""
    return [_end([str(word) for word in launch]) for launch in launches]


def _end(words: Sequence[str]) -> tuple[int, str]:
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        fork = Fork(["-c", SGLANG, "serve", *words], output)
        try:
            status = fork.wait(SECONDS)
        except subprocess.TimeoutExpired:
            fork.kill_all()
            status = fork.wait()
        return status, output.read_text()
