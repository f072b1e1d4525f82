"""Memory, files and threads that the processes of a server hold."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass

import psutil

from helpers.serving_harness import Server


def processes_of(server: Server) -> list[psutil.Process]:
    """The launching process, and all below it."""
    parent = psutil.Process(server.process.pid)
    return [parent, *parent.children(recursive=True)]


def process_named(server: Server, title: str) -> psutil.Process:
    """The one process whose title begins so."""
    (found,) = [
        process
        for process in processes_of(server)
        if "".join(process.cmdline()[:1]).startswith(title)
    ]
    return found


@dataclass(frozen=True)
class Footprint:
    """The sums over all processes of a server."""

    mib: float
    files: int
    threads: int

    @classmethod
    def of(cls, server: Server) -> Footprint:
        found = processes_of(server)
        return cls(
            sum(process.memory_info().rss for process in found) / 2**20,
            sum(process.num_fds() for process in found),
            sum(process.num_threads() for process in found),
        )

    @classmethod
    def at_rest(cls, server: Server, seconds: float = 15) -> Footprint:
        """As small as it gets within some seconds after the last request.

        Idle connections are closed after 5 s, and idle threads end after 10 s.
        """
        server.wait_until_idle()
        found = cls.of(server)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            time.sleep(1)
            now = cls.of(server)
            found = cls(
                min(found.mib, now.mib),
                min(found.files, now.files),
                min(found.threads, now.threads),
            )
        return found


@contextlib.contextmanager
def no_room_for_files(server: Server) -> Iterator[None]:
    """Every write to a file fails, as on a full disk, in all processes of a server.

    The system refuses a write behind the largest size of a file, which is 0 then.
    Python ignores the signal that comes with it. Sockets and pipes go on.
    """
    found = processes_of(server)
    before = [process.rlimit(psutil.RLIMIT_FSIZE) for process in found]
    try:
        for process, (_, hard) in zip(found, before, strict=True):
            process.rlimit(psutil.RLIMIT_FSIZE, (0, hard))
        yield
    finally:
        for process, limits in zip(found, before, strict=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.rlimit(psutil.RLIMIT_FSIZE, limits)
