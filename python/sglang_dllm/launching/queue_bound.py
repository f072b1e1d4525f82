"""The bound of the queue: which request is refused, and when it may come back.

The launching process decides before it reads a request, so that every route, streamed
or not, is refused alike and a request of many canvases is never cut in two.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

SHORTEST, LONGEST = 1, 60
"""Seconds of a ``Retry-After``. OpenAI's clients follow it up to 60."""

_WINDOW = 60.0
"""Seconds over which the progress is measured."""


def retry_after(seconds: float) -> int:
    """The header's value: whole seconds, rounded up."""
    return min(LONGEST, max(SHORTEST, math.ceil(seconds)))


@dataclass(frozen=True)
class Load:
    """The schedulers' load as they told it last, summed over data-parallel ranks.

    Attributes:
        places: requests that may run at once.
        running, waiting: requests.
        waiting_tokens: of the canvases of the waiting requests.
    """

    places: int = 0
    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0


class QueueBound:
    """Counts the requests that wait, and measures how fast they go."""

    def __init__(
        self,
        most: int,
        num_in_flight: Callable[[], int],
        load: Callable[[], Load],
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        """
        Args:
            most: requests that may wait.
            num_in_flight: requests of which SGLang's tokenizer manager knows.
            load: of the schedulers.
            now: the clock, in seconds.
        """
        self._most = most
        self._num_in_flight = num_in_flight
        self._load = load
        self._now = now
        self._num_on_the_way = 0
        self._ended: deque[tuple[float, int]] = deque()
        self._since = now()

    def refusal(self) -> int | None:
        """Seconds after which a refused request may come back; None if it may enter.

        They are the canvas tokens that wait, divided by the canvas tokens that ended
        per second. If none has ended since the server was idle, they are the seconds
        since then.
        """
        in_flight = self._num_on_the_way + self._num_in_flight()
        if in_flight == 0:
            self._since = self._now()
            self._ended.clear()
        load = self._load()
        # A scheduler with an empty queue may have had room for more.
        at_work = load.running if load.waiting else load.places
        num_waiting = in_flight - at_work
        if num_waiting < self._most or in_flight == 0:
            return None
        return retry_after(self._seconds(num_waiting, load))

    def _seconds(self, num_waiting: int, load: Load) -> float:
        self._forget()
        passed = min(_WINDOW, self._now() - self._since)
        done = sum(tokens for _, tokens in self._ended)
        if not done:
            return passed
        # The schedulers have not seen the last ones.
        num_unseen = max(0, num_waiting - load.waiting)
        tokens = load.waiting_tokens + num_unseen * done / len(self._ended)
        return tokens * passed / done

    @contextmanager
    def entering(self) -> Iterator[None]:
        """A request is on its way to the tokenizer manager, or is refused before."""
        entry = Entry(self)
        token = ENTRY.set(entry)
        self._num_on_the_way += 1
        try:
            yield
        finally:
            entry.arrive()
            ENTRY.reset(token)

    def _arrived(self) -> None:
        self._num_on_the_way -= 1

    def _has_ended(self, num_tokens: int) -> None:
        # Here too: a server that is never idle and never full would keep them all.
        self._forget()
        self._ended.append((self._now(), num_tokens))

    def _forget(self) -> None:
        """Drop what ended before the window."""
        first = self._now() - _WINDOW
        while self._ended and self._ended[0][0] < first:
            self._ended.popleft()


class Entry:
    """A request that has passed the bound."""

    def __init__(self, bound: QueueBound) -> None:
        self._bound = bound
        self._has_arrived = False

    def arrive(self) -> None:
        """The tokenizer manager counts the request from now on."""
        if not self._has_arrived:
            self._has_arrived = True
            self._bound._arrived()

    def ended(self, num_tokens: int) -> None:
        """One of its canvases has ended.

        Args:
            num_tokens: of the canvas.
        """
        self._bound._has_ended(num_tokens)


ENTRY: ContextVar[Entry | None] = ContextVar("ENTRY", default=None)
"""The entry of the HTTP request that is being answered. None in the Python engine."""
