"""The server that this process launches: probes, signals, and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from sglang_dllm.launching.end_note import FAILURE, End, EndNote
from sglang_dllm.launching.processes import Watch, kill_children
from sglang_dllm.launching.queue_bound import retry_after

logger = logging.getLogger(__name__)

_POLL = 0.1
"""Seconds between two looks for a signal, or for requests that still run."""

_FLUSH = 1.0
"""Seconds in which the last bytes of the last answers leave, once all are written."""


_TERMINATED = End(143, "terminated before the server was ready")
"""SIGTERM in shells' form: 128 and the number of the signal."""


class ServerLaunch:
    """One server of ours, from its launch to its end, in the launching process.

    Attributes:
        note: the note that a failing process leaves.
        watch: looks after the processes.
    """

    def __init__(self) -> None:
        self.note = EndNote.create()
        self.watch = Watch(self._on_gone, lambda: self.note.read() is not None)
        self._begin = time.monotonic()
        self._seconds_to_start: float | None = None
        self._num_active = 0
        self._num_signals = 0
        self._is_drained = False
        self._ender: int | None = None
        self._lock = threading.Lock()

    @property
    def is_draining(self) -> bool:
        """True once a signal has asked for the end."""
        return self._num_signals > 0

    def started(self) -> None:
        """Note that the server takes requests from now on."""
        self._seconds_to_start = time.monotonic() - self._begin

    @property
    def seconds_to_restart(self) -> int:
        """The seconds that the start of this server took: a new one needs as many."""
        return retry_after(self._seconds_to_start or time.monotonic() - self._begin)

    def take_sigterm(self) -> None:
        """End the launch at a SIGTERM, until the event loop takes the signals.

        Processes that have just been started do not see yet that their parent has gone.
        """
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: self.end(_TERMINATED))

    def on_signal(self, number: int) -> None:
        """SIGTERM or SIGINT: the first drains, the second ends at once."""
        self._num_signals += 1
        name = signal.Signals(number).name
        if self._num_signals == 1:
            logger.warning(
                "%s: new requests are refused; the server ends after the %d that run. "
                "A second signal ends it at once.",
                name,
                self._num_active,
            )
        elif self._num_active == 0:
            self.end(End(0))
        else:
            cut = f"a second signal ({name}) cut {self._num_active} requests"
            self.end(End(FAILURE, cut))

    @contextmanager
    def answering(self) -> Iterator[None]:
        """A request is being answered, until its last byte is written."""
        self._num_active += 1
        try:
            yield
        finally:
            self._num_active -= 1

    async def drained(self) -> None:
        """Wait for a signal, and then until the last request is answered."""
        while not self.is_draining or self._num_active:
            await asyncio.sleep(_POLL)
        await asyncio.sleep(_FLUSH)
        # From here on SGLang ends its processes itself.
        self._is_drained = True
        self.watch.stop()

    def end(self, end: End | None = None) -> None:
        """End this process and all below it; the reason is the last line.

        It returns only where this thread is ending the process already: a signal has
        come in between.

        Args:
            end: None where SGLang ends the server: its processes tell why.
        """
        with self._lock:
            is_second = self._ender is not None
            self._ender = self._ender or threading.get_ident()
        if is_second:
            if self._ender != threading.get_ident():
                threading.Event().wait()
            return
        end = end or self._own_end()
        self.watch.stop()
        kill_children()
        self.note.remove()
        end.tell()
        os._exit(end.status)

    def close(self) -> None:
        """Note that the server has ended in good order."""
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.watch.stop()
        self.note.remove()

    def why(self) -> End | None:
        """The end of a server whose process has failed; None if none has."""
        noted, gone = self.note.read(), self.watch.gone()
        if gone is not None and (noted is None or gone.was_killed):
            # The failures of the others follow from it.
            return End(FAILURE, gone.text)
        return noted

    def _own_end(self) -> End:
        if self._is_drained:
            return End(0)
        # A process that has told of its failure is about to go.
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline:
            end = self.why()
            if end is not None:
                return end
            time.sleep(_POLL)
        return End(FAILURE, "the server failed; the log above says why")

    def _on_gone(self) -> None:
        # SGLang's own handler would wait a minute for dumps that nobody asked for.
        self.end(self.why())


_current: ServerLaunch | None = None
_has_left = False


def begin() -> ServerLaunch:
    """The launch of a server of ours begins in this process."""
    global _current, _has_left
    _has_left = False
    _current = ServerLaunch()
    _current.watch.start()
    return _current


def finish() -> None:
    """The server of this process has ended in good order."""
    global _current
    if _current is not None:
        _current.close()
    _current = None


def leave(end: End) -> NoReturn:
    """End a launch that has started no process yet.

    Raises:
        SystemExit: with the status. SGLang's command has something to do then.
    """
    global _has_left
    _has_left = True
    end.tell()
    raise SystemExit(end.status)


def has_left() -> bool:
    """True if this process is about to end, and has said why."""
    return _has_left


def current() -> ServerLaunch | None:
    """The server that this process launches; None where it is not ours."""
    return _current
