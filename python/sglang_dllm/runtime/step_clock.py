"""Measures the parts of a round. It never waits for the device."""

from __future__ import annotations

import time
from itertools import pairwise
from typing import Any, Protocol

import torch


class Observer(Protocol):
    """Gets the seconds of a phase: ``forward``, ``decision`` or ``host``."""

    def took(self, phase: str, seconds: float) -> None: ...


class NoClock:
    """Measures nothing, where metrics are off."""

    def round_begins(self) -> None: ...

    def step_begins(self) -> None: ...

    def launched(self) -> None: ...

    def decided(self) -> None: ...

    def synced(self) -> None: ...

    def round_ends(self) -> None: ...

    def rests(self) -> None: ...


class StepClock(NoClock):
    """Splits rounds in forward, decision and host.

    On a CUDA device the marks of a step are events, which are read when the host has
    waited for the step anyway. Elsewhere an operation ends before the host goes on, so
    that the host's clock is right. A captured step has no mark between forward and
    decision: all of it counts as forward. The language model head runs when an
    algorithm asks for logits, and counts as decision.

    The time between the end of a round and the begin of the next one is the host's, as
    long as a canvas is active: emission, the queue, admission. A device that runs a
    prelaunched forward is not idle meanwhile.
    """

    def __init__(self, observer: Observer, device: str) -> None:
        self._observer, self._is_cuda = observer, device == "cuda"
        self._marks: list[Any] = []
        self._round_end: float | None = None

    def round_begins(self) -> None:
        if self._round_end is not None:
            self._observer.took("host", time.perf_counter() - self._round_end)
            self._round_end = None

    def step_begins(self) -> None:
        self._marks = [self._mark()]

    def launched(self) -> None:
        self._marks.append(self._mark())

    def decided(self) -> None:
        self._marks.append(self._mark())

    def synced(self) -> None:
        """Read the marks of the step. The host has waited for the last of them."""
        marks, self._marks = self._marks, []
        if len(marks) != 3:
            return
        seconds = [self._seconds(*pair) for pair in pairwise(marks)]
        if None in seconds:
            return
        for phase, one in zip(("forward", "decision"), seconds, strict=True):
            self._observer.took(phase, one)

    def round_ends(self) -> None:
        self._round_end = time.perf_counter()

    def rests(self) -> None:
        """Note that no canvas is active: the next round may be hours away."""
        self._round_end = None

    def _mark(self) -> Any:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _seconds(self, first: Any, last: Any) -> Any:
        """None where the device has not come so far: nobody waits for it here."""
        if not self._is_cuda:
            return last - first
        return first.elapsed_time(last) / 1000 if last.query() else None
