"""The processes that a server has started."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.process import BaseProcess

import psutil

_TITLE = "sglang::"
"""The command lines of SGLang's processes begin so, once they have set their title."""

_CONTROLLER = _TITLE + "data_parallel_controller"
"""The one process that has ranks below it."""

_INTERVAL = 0.5
"""Seconds between two looks."""

_TIME_TO_NOTE = 1.0
"""Seconds in which another thread notes a status that it has taken."""

_TIME_TO_GO = 10.0
"""Seconds in which a process that has told of its failure has to end."""


def kill_children(timeout: float = 30) -> None:
    """Kill all processes below this one, and wait until they hold nothing."""
    children = psutil.Process().children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()
    deadline = time.monotonic() + timeout
    while any(map(_lives, children)) and time.monotonic() < deadline:
        time.sleep(0.05)


def _lives(process: psutil.Process) -> bool:
    """False for a zombie too: it holds no memory and no port any more."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except (psutil.NoSuchProcess, OSError):
        return False


@dataclass(frozen=True)
class Gone:
    """A process that has ended.

    Attributes:
        text: its title, its id, and how it ended as far as the system still tells.
        was_killed: SIGKILL ended it, which comes from outside. Other processes may
            then fail for want of it.
    """

    text: str
    was_killed: bool

    @classmethod
    def of(cls, pid: int, title: str, owner: BaseProcess | None) -> Gone:
        """Read how a process ended.

        Args:
            owner: the object that has started it, if this process has one.
        """
        name, code = f"{title} (pid {pid})", _exit_code(pid, owner)
        if code is None:
            return cls(f"{name} has gone", False)
        if code >= 0:
            return cls(f"{name} ended with status {code}", False)
        number = signal.Signals(-code)
        return cls(f"{name} was killed by {number.name}", number == signal.SIGKILL)


def _exit_code(pid: int, owner: BaseProcess | None) -> int | None:
    """The status of a process that has gone, negative for a signal; None if lost.

    A child's status is left to its owner. SGLang watches its processes too. If it was
    quicker, the system has no status any more, and the owner knows it. The other thread
    may have taken it and not yet noted it there.
    """
    with contextlib.suppress(OSError):
        found = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT)
        if found is not None:
            is_exit = found.si_code == os.CLD_EXITED
            return found.si_status if is_exit else -found.si_status
    deadline = time.monotonic() + _TIME_TO_NOTE
    while owner is not None and time.monotonic() < deadline:
        if (code := owner.exitcode) is not None:
            return code
        time.sleep(0.01)
    return None


class Watch:
    """Looks twice a second whether SGLang's processes below this one live.

    SGLang looks too, but not at the ranks below a data parallel controller, and not
    before the model is loaded. A process that fails may hang while it ends: its threads
    or its rank's connections wait for somebody.
    """

    def __init__(
        self, on_gone: Callable[[], None], has_failed: Callable[[], bool]
    ) -> None:
        """
        Args:
            on_gone: called once, in the watch's thread, when a process has gone, or has
                failed and is still there after 10 s.
            has_failed: True once a process has told of its failure.
        """
        self._on_gone = on_gone
        self._has_failed = has_failed
        self._titles: dict[psutil.Process, str] = {}
        self._owners: dict[int, BaseProcess] = {}
        self._is_complete = threading.Event()
        self._is_stopped = threading.Event()

    def start(self) -> None:
        """Begin to look."""
        threading.Thread(target=self._run, daemon=True, name="dllm-watch").start()

    def complete(self) -> None:
        """Note that all processes have started: nobody looks for new ones any more."""
        self._find_new()
        self._is_complete.set()

    def stop(self) -> None:
        """Stop to look: the processes are about to end."""
        self._is_stopped.set()

    def gone(self) -> Gone | None:
        """A process that has gone, a killed one before others; None if all live."""
        found = [
            Gone.of(process.pid, title, self._owners.get(process.pid))
            for process, title in list(self._titles.items())
            if not _lives(process)
        ]
        return max(found, key=lambda gone: gone.was_killed, default=None)

    def _run(self) -> None:
        seconds_failed = 0.0
        while not self._is_stopped.wait(_INTERVAL):
            if not self._is_complete.is_set():
                self._find_new()
            seconds_failed += _INTERVAL if self._has_failed() else 0
            is_over = self.gone() is not None or seconds_failed >= _TIME_TO_GO
            if is_over and not self._is_stopped.is_set():
                self._on_gone()
                return

    def _find_new(self) -> None:
        for owner in multiprocessing.active_children():
            if owner.pid is not None:
                self._owners.setdefault(owner.pid, owner)
        for process, title in _titled(psutil.Process()):
            self._titles.setdefault(process, title)
            if title.startswith(_CONTROLLER):
                for rank, rank_title in _titled(process):
                    # A fork has its parent's title until it runs another program.
                    if rank_title != title:
                        self._titles.setdefault(rank, rank_title)


def _titled(parent: psutil.Process) -> Iterator[tuple[psutil.Process, str]]:
    """The children of a process that are SGLang's, with their titles.

    Processes further below are programs that a rank runs for a moment.
    """
    with contextlib.suppress(psutil.Error):
        for process in parent.children():
            with contextlib.suppress(psutil.Error):
                title = "".join(process.cmdline()[:1]).strip()
                if title.startswith(_TITLE):
                    yield process, title
