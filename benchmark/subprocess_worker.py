"""An object in a process of its own.

SGLang's parallel state is global, so a process holds one model at most.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmark.command import BenchmarkError

END_SECONDS = 10

Call = Callable[..., Any]
"""Takes a method's name and arguments, returns the method's result."""


@contextmanager
def in_subprocess(make: str, *arguments: Any) -> Iterator[Call]:
    """Make an object in a fresh process and call its methods there, one at a time.

    The process waits between calls and takes no CPU then. Its output goes to a file.

    Args:
        make: ``module:Class``. Only the new process imports the module.
        arguments: of the class. They must be picklable.

    Raises:
        BenchmarkError: with the last line of the error in the other process.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        process = context.Process(
            target=_serve, args=(theirs, log, make, arguments), daemon=True
        )
        process.start()
        theirs.close()

        def call(name: str, *args: Any) -> Any:
            try:
                ours.send((name, args))
                is_error, result = ours.recv()
            except (EOFError, BrokenPipeError):
                raise BenchmarkError(f"its process ended: {_last_line(log)}") from None
            if is_error:
                raise BenchmarkError(result)
            return result

        try:
            call("__class__")  # returns once the object exists
            yield call
        finally:
            ours.close()
            process.join(END_SECONDS)
            process.kill()


def _last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").split("\n") if log.exists() else []
    return next((line for line in reversed(lines) if line.strip()), "no message")


def _serve(pipe: Connection, log: Path, make: str, arguments: tuple[Any, ...]) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    it: Any = None
    while True:
        try:
            name, args = pipe.recv()
        except EOFError:
            return
        try:
            if it is None:
                module, _, name_of = make.partition(":")
                it = getattr(importlib.import_module(module), name_of)(*arguments)
            result = None if name == "__class__" else getattr(it, name)(*args)
            pipe.send((False, result))
        except Exception as error:
            text = str(error).strip().split("\n")[-1] or type(error).__name__
            pipe.send((True, f"{type(error).__name__}: {text}"))
