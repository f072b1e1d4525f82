"""The denoising engine: it runs rounds over canvases and owns the forward in flight.

It knows nothing of SGLang. Admission gives it canvases, a ``ModelForward`` runs the
model, and emission reads the ``Canvas`` records after a round.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.guard import OUT_OF_MEMORY, ends_requests_only
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.models.facts import ModelFacts
from sglang_dllm.runtime.step_clock import NoClock

logger = logging.getLogger(__name__)


class ModelForward(Protocol):
    """Runs the model on packed forwards.

    Attributes:
        in_graph: whether the last forward ran in a CUDA graph.
    """

    in_graph: bool

    def launch(self, packed: PackedForward) -> Logits:
        """Start a forward. The host does not wait for it.

        Returns:
            The logits of the tokens ``packed.logits_indices``.
        """
        ...

    def launch_step(self, group: Group) -> bool:
        """Start a captured step of a group: its forward and its commit.

        Returns:
            False if no capture holds it. Nothing was started then.
        """
        ...

    def weights_changed(self) -> None:
        """Drop all captures. No forward may be in flight."""
        ...

    def recapture(self) -> None:
        """Capture what was dropped. Does nothing if nothing was.

        Canvases may be active; a capture touches none of them.
        """
        ...


class Metrics(Protocol):
    """Counts requests that ended or were refused, and shows the active canvases."""

    def ended(self, canvas: Canvas) -> None: ...

    def active(self, canvases: Sequence[Canvas], num_queued: int) -> None: ...

    def refused(self, error: Exception) -> None: ...


@dataclass(frozen=True)
class InFlight:
    """A forward that is launched and not committed yet.

    Attributes:
        logits: of its candidates. None for a captured step, which commits itself.
    """

    logits: Logits | None


class DenoisingEngine:
    """The canvases of all admitted requests, and the forward that runs over them.

    The scheduler's thread is the only user. A canvas may join or leave the denoiser
    only while no forward is in flight, because a commit reads the packing that the
    forward was launched with. So a new canvas waits among the arrivals, and whoever
    takes a canvas out finishes the forward first.

    Attributes:
        denoiser: decides what the canvases commit.
        model: runs forwards.
        metrics: counts canvases when they are released.
        steps_per_round: the most steps of one round.
        prelaunch: whether a round ends with the launch of the next round's first
            forward. The device then runs it while the scheduler hands out tokens.
        clock: measures the parts of a step.
        num_canvas_forwards: forwards of single canvases since the start.
        in_flight: None while no forward runs.
        canvases: all that were admitted and neither released nor parked. A canvas
            that failed stays here until it is released.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        model: ModelForward,
        metrics: Metrics,
        steps_per_round: int = 1,
        prelaunch: bool = False,
        clock: NoClock | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.model = model
        self.metrics = metrics
        self.steps_per_round = steps_per_round
        self.prelaunch = prelaunch
        self.clock = clock or NoClock()
        self.num_canvas_forwards = 0
        self.in_flight: InFlight | None = None
        self.canvases: list[Canvas] = []
        self._arrivals: list[Group] = []

    @property
    def facts(self) -> ModelFacts:
        return self.denoiser.facts

    def prepare(self, canvas: Canvas, decoding: Decoding) -> Group:
        """A new canvas and its first step, ready for ``admit``.

        Raises:
            Exception: whatever the algorithm raises.
        """
        return self.denoiser.prepare(canvas, decoding)

    def admit(self, group: Group) -> None:
        """Take a canvas in, from ``prepare`` or from ``park``.

        It joins before the next forward is packed. If a forward is in flight, it joins
        after the commit of that forward.
        """
        self._arrivals.append(group)
        self.canvases += group.records

    def run_round(self) -> None:
        """Run up to ``steps_per_round`` steps, fewer where a canvas is done or failed.

        A forward that finds no memory fails its canvases, and no others.

        Raises:
            Exception: the forward failed otherwise. No forward is in flight then. Such
                an error is not the fault of an algorithm, and the device may be
                unusable after it, so it ends the scheduler as with every other model.
        """
        self.clock.round_begins()
        if self.in_flight is None and self._arrivals:
            with self._within_memory():
                self._join_arrivals()
                self.denoiser.sync()
        for _ in range(self.steps_per_round):
            if not self._can_go_on():
                break
            if self.in_flight is None:
                self._launch()
            self.finish_in_flight()
        if self.prelaunch and self._can_go_on():
            self._launch()
        self.clock.round_ends()

    def finish_in_flight(self) -> None:
        """Commit the forward in flight, if there is one, and choose the next step."""
        if self.in_flight is None:
            return
        logits, self.in_flight = self.in_flight.logits, None
        self.num_canvas_forwards += len(self.denoiser.canvases)
        with self._within_memory():
            if logits is None:
                self.denoiser.commit_captured()
            else:
                self.denoiser.commit(logits)
        # The logits may be large, and the next forward needs their memory.
        del logits
        self.clock.decided()
        with self._within_memory():
            self._join_arrivals()
            self.denoiser.sync()
        self.clock.synced()

    def resize(self, canvas: Canvas, decoding: Decoding) -> Group | None:
        """Take a canvas out and change its length, as it asks for.

        Args:
            decoding: of the request, for a canvas of any length.

        Returns:
            The canvas and its next step, ready for ``admit``. None where no mask is
            left.

        Raises:
            Exception: whatever the algorithm raises.
        """
        self._take_out([canvas])
        self.denoiser.remove([canvas])
        canvas.apply_resize()
        if canvas.done:
            return None
        return self.prepare(canvas, decoding.finalized(canvas.answer_len, self.facts))

    def release(self, canvases: Sequence[Canvas]) -> None:
        """Forget canvases whose requests ended, and count what they did.

        Their KV slots may be freed afterwards, not before.
        """
        if not canvases:
            return
        self._take_out(canvases)
        self.denoiser.remove(canvases)
        for canvas in canvases:
            self.metrics.ended(canvas)

    def park(self, canvases: Sequence[Canvas]) -> list[Group | None]:
        """Take out canvases whose requests were retracted, with all their state.

        Returns:
            For each canvas a group for ``admit``. None for a canvas that failed, which
            has no state any more.
        """
        if not canvases:
            return []
        waiting = self._take_out(canvases)
        decoding = set(map(id, self.denoiser.canvases))
        return [
            self.denoiser.park(canvas)
            if id(canvas) in decoding
            else waiting.get(id(canvas))
            for canvas in canvases
        ]

    def _take_out(self, canvases: Sequence[Canvas]) -> dict[int, Group]:
        """Strike canvases off the lists, after the forward in flight.

        Returns:
            The groups of those that were still among the arrivals, by the canvas's id.
        """
        self.finish_in_flight()
        leaving = set(map(id, canvases))
        self.canvases = [c for c in self.canvases if id(c) not in leaving]
        if not self.canvases:
            self.clock.rests()
        arrivals, self._arrivals = self._arrivals, []
        waiting = {}
        for group in arrivals:
            (canvas,) = group.records
            if id(canvas) in leaving:
                waiting[id(canvas)] = group
            else:
                self._arrivals.append(group)
        return waiting

    def _join_arrivals(self) -> None:
        for group in self._arrivals:
            self.denoiser.join(group)
        self._arrivals = []

    def _can_go_on(self) -> bool:
        """True if no canvas waits for the end of the round."""
        return bool(self.canvases) and not any(
            canvas.done or canvas.resize is not None or canvas.failure is not None
            for canvas in self.canvases
        )

    def _launch(self) -> None:
        self.clock.step_begins()
        with self._within_memory():
            group = self.denoiser.only_group()
            if group is not None and self.model.launch_step(group):
                self.in_flight = InFlight(None)
            else:
                packed = self.denoiser.pack()
                self.in_flight = InFlight(self.model.launch(packed))
        self.clock.launched()

    @contextmanager
    def _within_memory(self) -> Iterator[None]:
        """Fail the canvases of the denoiser, should there be no memory for a step.

        A step that stopped halfway has left no canvas that could go on.
        """
        try:
            yield
        except Exception as error:
            if not ends_requests_only(error, self.denoiser.agree):
                raise
            canvases = self.denoiser.canvases
            tokens = sum(canvas.num_windows * len(canvas) for canvas in canvases)
            logger.error(
                "out of memory in a forward of %d canvases with up to %d tokens, whose "
                "requests end; --max-prefill-tokens limits the tokens of a forward",
                *(len(canvases), tokens),
                exc_info=error,
            )
            self.denoiser.fail(OUT_OF_MEMORY)
