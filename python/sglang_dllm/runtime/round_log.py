"""A line of the log about rounds, beside SGLang's own."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

logger = logging.getLogger(__name__)


class RoundLog:
    """Sums up rounds, and writes a line every ``--decode-log-interval`` rounds.

    SGLang writes a line of its own as often. Ours comes half an interval later, so that
    no round has two of them unless the interval is 1.
    """

    def __init__(
        self, interval: int, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        """
        Args:
            interval: in rounds; 0 for no lines.
        """
        self._interval, self._clock = interval, clock
        self._since = clock()
        self._tokens = self._forwards = 0

    def add(
        self,
        round_number: int,
        num_tokens: int,
        num_forwards: int,
        num_canvases: int,
        num_queued: int,
    ) -> None:
        """Take in a round.

        Args:
            num_tokens: that the round handed out.
            num_forwards: of single canvases, since the start of the engine.
        """
        self._tokens += num_tokens
        interval = self._interval
        if not interval or round_number % interval != interval // 2:
            return
        now, forwards = self._clock(), num_forwards - self._forwards
        logger.info(
            "Canvases: %d, queue: %d, tokens: %.1f/s, forwards of canvases: %d, "
            "tokens per forward: %.2f",
            num_canvases,
            num_queued,
            self._tokens / max(now - self._since, 1e-9),
            forwards,
            self._tokens / max(forwards, 1),
        )
        self._since, self._tokens, self._forwards = now, 0, num_forwards
