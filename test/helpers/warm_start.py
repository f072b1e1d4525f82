"""Python processes that start as forks of one that has SGLang in memory.

SGLang takes 12 seconds of a CPU to import, and a server does it three times. The forks
share one import. All else is as in ``python``: the words of the command, the processes
of a server, its plugins, the environment. Only what a module reads from the environment
when it is imported is that of the tests.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.context
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import setproctitle

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        "sglang.srt.entrypoints.http_server",
        "sglang.srt.managers.scheduler",
        "sglang.srt.managers.detokenizer_manager",
        "sglang.srt.models.registry",
        "sglang.cli.serve",
    ]
)


class Fork:
    """``python`` with these words, with the methods of ``subprocess.Popen`` for it.

    Args:
        words: ``-m MODULE``, ``-c CODE`` or a file, and its arguments.
        output: the file of the standard output, and of errors if ``errors`` is None.
        env: added to the environment. ``PYTHONPATH`` works too.
    """

    def __init__(
        self,
        words: Sequence[str],
        output: Path,
        errors: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> None:
        # Tests may have set variables since the first fork.
        variables = {**os.environ, **(env or {})}
        self._process = _FORKS.Process(
            target=_become, args=(list(words), output, errors, variables)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(["python"], timeout or 0)
        return self._process.exitcode

    def send_signal(self, sig: int, /) -> None:
        os.kill(self.pid, sig)

    def kill(self) -> None:
        self._process.kill()

    def kill_all(self) -> None:
        """Kill this process and those that it has started."""
        os.killpg(self.pid, signal.SIGKILL)


def run_python(
    words: Sequence[str], timeout: float, env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """``subprocess.run`` of such a process. Its standard input is empty.

    Raises:
        subprocess.TimeoutExpired: the process was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        fork = Fork(words, output, errors, env)
        try:
            status = fork.wait(timeout)
        except subprocess.TimeoutExpired:
            fork.kill_all()
            raise
        return subprocess.CompletedProcess(
            list(words), status, output.read_text(), errors.read_text()
        )


def _become(
    words: list[str], output: Path, errors: Path | None, env: dict[str, str]
) -> None:
    os.setsid()
    # It finds the place of the title once, next to the first variable. A variable that
    # is set again moves away.
    setproctitle.getproctitle()
    os.environ.update(env)
    sys.path[:0] = filter(None, env.get("PYTHONPATH", "").split(os.pathsep))
    os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1)
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT) if errors else 1, 2)
    # SGLang asks for "spawn", whose processes import everything again.
    contexts = multiprocessing.context._concrete_contexts  # type: ignore[attr-defined]
    contexts["spawn"] = contexts["fork"]
    match words:
        case ["-m", module, *arguments]:
            sys.argv = [module, *arguments]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        case ["-c", code, *arguments]:
            sys.argv = ["-c", *arguments]
            exec(code, {"__name__": "__main__"})
        case [file, *_]:
            sys.argv = words
            runpy.run_path(file, run_name="__main__")
