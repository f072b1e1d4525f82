"""Runs launches that are about to fail, each in a fork of one process.

SGLang takes 13 seconds to import; the forks share that. Reads a JSON list of argument
lists of ``sglang serve`` from stdin, and prints a JSON list of ``[status, output]``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

SECONDS = 150
"""A launch that takes longer is killed and has the status -9."""


def in_fork(arguments: Sequence[str]) -> tuple[int, str]:
    """The exit status and the output of one launch."""
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.setsid()
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            _serve(arguments)
        deadline = time.monotonic() + SECONDS
        found, status = 0, 0
        while not found:
            found, status = os.waitpid(child, os.WNOHANG)
            if not found and time.monotonic() > deadline:
                os.killpg(child, 9)
            time.sleep(0.05)
        output.seek(0)
        return os.waitstatus_to_exitcode(status), output.read()


def _serve(arguments: Sequence[str]) -> None:
    """``sglang serve`` with these arguments; this process ends as the command does."""
    import traceback

    from sglang.cli.main import main

    sys.argv = ["sglang", "serve", *arguments]
    status = 0
    try:
        main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def ends(launches: Iterable[Sequence[object]]) -> list[tuple[int, str]]:
    """Start a process of this module and return how its launches ended."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.launch_ends"],
        input=json.dumps([[str(word) for word in launch] for launch in launches]),
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [tuple(end) for end in json.loads(done.stdout.strip().splitlines()[-1])]


if __name__ == "__main__":
    import sglang.srt.entrypoints.http_server  # noqa: F401

    print("\n" + json.dumps([in_fork(launch) for launch in json.load(sys.stdin)]))
