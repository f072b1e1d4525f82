"""Runs a helper module in a process of its own.

SGLang's parallel state is global: one process holds one model runner at a time, and a
test that makes one must not leave it to the tests behind.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import NoReturn

from helpers.warm_start import run_python

TEST = Path(__file__).parents[1]
ROOT = TEST.parent


def environment() -> dict[str, str]:
    """This environment, with test/ and the repository's root on Python's path."""
    path = os.pathsep.join([str(TEST), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep)}


def run_module(module: str, *args: str | Path, timeout: float = 400) -> str:
    """``python -m module args``, with test/ and the repository's root on its path.

    Returns:
        The standard output.

    Raises:
        AssertionError: the process failed; the message has the end of its output.
    """
    words = ["-m", module, *map(str, args)]
    done = run_python(words, timeout, environment())
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def leave() -> NoReturn:
    """End this process as it is, its results written.

    An ordered exit destroys the threads of gloo and of the loader in any order. Now and
    then that aborts the process.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
