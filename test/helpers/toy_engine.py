"""A denoising engine with a toy model, for tests without SGLang."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

from helpers.toy_model import Request, ToyModel, facts_of, resolve
from sglang_dllm.decoding.agreement import Agree, alone
from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.caches.registry import CACHES
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.resolved import Decoding
from sglang_dllm.runtime.engine import DenoisingEngine

FACTS = facts_of("llada")
LENGTH = 12
"""Tokens of every answer."""


class WatchedDenoiser(Denoiser):
    """Notes its calls. A canvas that joins or leaves during a forward is an error."""

    def __init__(self, events: list[str], agree: Agree) -> None:
        super().__init__(FACTS, agree=agree)
        self.events = events
        self.is_packed = False

    def pack(self) -> PackedForward:
        self.is_packed = True
        return super().pack()

    def commit(self, logits: Logits) -> None:
        self.events.append("commit")
        assert self.is_packed, "no forward was packed"
        self.is_packed = False
        super().commit(logits)

    def join(self, group: Group) -> None:
        assert not self.is_packed, "a canvas joins during a forward"
        self.events.append("join")
        super().join(group)

    def remove(self, canvases: Any) -> None:
        assert not self.is_packed, "a canvas leaves during a forward"
        super().remove(canvases)

    def fail(self, message: str) -> None:
        self.is_packed = False
        super().fail(message)

    def park(self, canvas: Canvas) -> Group:
        assert not self.is_packed, "a canvas leaves during a forward"
        return super().park(canvas)

    def sync(self) -> None:
        self.events.append("sync")
        super().sync()


class ToyForward:
    """A toy model as a ``ModelForward``; all its windows are full."""

    in_graph = False

    def __init__(self, events: list[str]) -> None:
        self.model = ToyModel(3)
        self.events = events
        self.has_graphs = True
        self.num_windows: list[int] = []

    def launch(self, packed: PackedForward) -> Logits:
        self.events.append("launch")
        self.num_windows.append(len(packed.lens))
        return self.model.forward(packed)

    def launch_step(self, group: Group) -> bool:
        return False

    def weights_changed(self) -> None:
        self.events.append("drop")
        self.has_graphs = False

    def recapture(self) -> None:
        if not self.has_graphs:
            self.events.append("capture")
        self.has_graphs = True


class Ended:
    """Metrics: how often each canvas was counted."""

    def __init__(self) -> None:
        self.counts: Counter[int] = Counter()
        self.num_active = 0
        self.refusals: list[str] = []

    def ended(self, canvas: Canvas) -> None:
        self.counts[id(canvas)] += 1

    def active(self, canvases: Sequence[Canvas], num_queued: int) -> None:
        self.num_active = len(canvases)

    def refused(self, error: Exception) -> None:
        self.refusals.append(str(error))


class ToyEngine:
    """An engine with everything that it was given."""

    def __init__(
        self, steps_per_round: int = 1, prelaunch: bool = False, agree: Agree = alone
    ) -> None:
        self.events: list[str] = []
        self.denoiser = WatchedDenoiser(self.events, agree)
        self.model = ToyForward(self.events)
        self.metrics = Ended()
        self.engine = DenoisingEngine(
            self.denoiser, self.model, self.metrics, steps_per_round, prelaunch
        )

    def prepare(
        self,
        number: int,
        algorithm: str | Algorithm[Any, Any] = "LLaDA",
        **options: Any,
    ) -> tuple[Canvas, Group]:
        """A canvas and its group. The number makes its prompt."""
        prompt = (1, number % 9, number)[: 1 + number % 3]
        if isinstance(algorithm, Algorithm):
            cache = CACHES["none"]
            parsed = algorithm.options(**options)
            decoding = Decoding(algorithm, parsed, cache, cache.options())
        else:
            request = Request(self.model.model, prompt, LENGTH, algorithm, options)
            decoding = resolve("llada", request)
        canvas = decoding.new_canvas(prompt, LENGTH, FACTS, ignore_eos=True)
        return canvas, self.denoiser.prepare(canvas, decoding)

    def add(self, number: int, *args: Any, **options: Any) -> Canvas:
        canvas, group = self.prepare(number, *args, **options)
        self.engine.admit(group)
        return canvas

    def launches(self) -> int:
        return self.events.count("launch")

    def run_to_end(self) -> None:
        """Rounds with the scheduler's part: what is done or failed is released."""
        for _ in range(500):
            if not self.engine.canvases:
                return
            self.engine.run_round()
            self.engine.release(
                [c for c in self.engine.canvases if c.done or c.failure is not None]
            )
        raise AssertionError("no end")


def outcome(canvas: Canvas) -> tuple[list[int], int]:
    assert canvas.failure is None
    return canvas.ids.tolist(), canvas.num_forwards


def alone(number: int, *args: Any, **options: Any) -> tuple[list[int], int]:
    setup = ToyEngine()
    canvas = setup.add(number, *args, **options)
    setup.run_to_end()
    return outcome(canvas)
