"""Whole steps as graphs: the engine does the same with them as without."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from helpers.recorded_steps import PoolModel
from helpers.static_steps import news
from helpers.toy_engine import Ended
from helpers.toy_model import Request, ToyModel, facts_of, resolve
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.static_group import StaticGroup, StepShape
from sglang_dllm.runtime.engine import DenoisingEngine

FACTS = facts_of("llada")
SHAPES = [StepShape(num, n, num * n) for n in (12, 24) for num in (1, 2, 4)]
DEFAULT: dict[str, Any] = {"cache": "dual", "block_size": 8}
PATIENT = {"threshold": 0.02}


class Setup:
    """An engine over a toy model, with captured steps or without."""

    def __init__(self, captured: bool, steps: int = 2, prelaunch: bool = True) -> None:
        self.model = PoolModel(num_canvases=8)
        self.denoiser = Denoiser(FACTS)
        self.engine = DenoisingEngine(
            self.denoiser, self.model, Ended(), steps, prelaunch
        )
        self.static = StaticGroup(
            resolve("llada", self.request(30)),
            FACTS,
            torch.device("cpu"),
            num_canvases=4,
            answer_len=30,
            canvas_len=50,
        )
        if captured:
            self.model.capture(self.static, SHAPES)

    def request(
        self, length: int, algorithm: str = "FullAttnMultiBlock", **options: Any
    ) -> Request:
        return Request(ToyModel(0), (), length, algorithm, DEFAULT | options)

    def add(
        self,
        number: int,
        algorithm: str = "FullAttnMultiBlock",
        sampling: SamplingOptions | None = None,
        **options: Any,
    ) -> Canvas:
        length = 8 + number * 5 % 23
        decoding = resolve("llada", self.request(length, algorithm, **options))
        canvas = decoding.new_canvas(
            range(number % 7 + 1), length, FACTS, sampling=sampling
        )
        self.model.place_slots(canvas, number % 8)
        self.engine.admit(self.engine.prepare(canvas, decoding))
        return canvas

    def run_to_end(self) -> None:
        for _ in range(300):
            self.release_ended()
            if not self.engine.canvases:
                return
            self.engine.run_round()
        raise AssertionError("no end")

    def release_ended(self) -> None:
        ended = [c for c in self.engine.canvases if c.done or c.failure is not None]
        self.engine.release(ended)


def play(setup: Setup, seed: int) -> list[tuple[Any, ...]]:
    """Requests that come, are aborted, parked and admitted again, at random."""
    draw, canvases = random.Random(seed), []
    parked: list[Group] = []
    for number in range(8):
        algorithm = "FullAttnMultiBlock" if draw.random() < 0.9 else "FastDLLM"
        options = PATIENT if algorithm == "FullAttnMultiBlock" else {}
        most = {"max_forwards": 5} if number == 3 else {}
        canvases.append(setup.add(number, algorithm, **options | most))
        for _ in range(draw.randrange(3)):
            setup.engine.run_round()
            setup.release_ended()
        alive = [c for c in canvases if c in setup.engine.canvases]
        if alive and draw.random() < 0.2:
            setup.engine.release([draw.choice(alive)])
        elif alive and draw.random() < 0.3:
            parked += filter(None, setup.engine.park([draw.choice(alive)]))
        elif parked:
            setup.engine.admit(parked.pop())
    for group in parked:
        setup.engine.admit(group)
    setup.run_to_end()
    return [news(canvas) for canvas in canvases]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("prelaunch", [False, True])
def test_a_crowd_is_the_same_in_captured_steps(seed: int, prelaunch: bool) -> None:
    steps = 1 + seed % 3
    captured = Setup(True, steps, prelaunch)
    found = play(captured, seed)
    assert found == play(Setup(False, steps, prelaunch), seed)
    assert captured.model.num_captured > 3
    assert captured.engine.in_flight is None and captured.denoiser.canvases == []


def test_the_smallest_graph_that_holds_a_step_runs_it() -> None:
    setup = Setup(True)
    steps = setup.model.steps
    assert steps is not None and steps.shapes == sorted(SHAPES)
    canvas = setup.add(1)
    setup.engine.run_round()
    canvas.window, canvas.num_candidates = (0, 12), 12
    graphs = steps._graphs

    def first(*canvases: Canvas) -> StepShape | None:
        return next((g.shape for g in graphs if g.holds(canvases)), None)

    assert first(canvas) == (1, 12, 12)
    assert first(canvas, canvas, canvas) == (4, 12, 48)
    canvas.num_candidates = 13
    assert first(canvas) == (1, 24, 24)
    canvas.window = (0, 25)
    assert first(canvas) is None


def test_what_no_graph_holds_runs_as_before() -> None:
    setup = Setup(True)
    setup.add(1, "FastDLLM")
    setup.add(2, sampling=SamplingOptions(temperature=0.5, seed=1))
    setup.run_to_end()
    assert setup.model.num_captured == 0 < setup.model.num_eager


def test_captures_that_are_dropped_leave_the_canvases_as_they_are() -> None:
    setup, other = Setup(True), Setup(False)
    canvases = [one.add(3, **PATIENT) for one in (setup, other)]
    setup.engine.run_round()
    setup.engine.run_round()
    assert setup.model.num_captured > 0
    setup.model.steps = None
    for one in (setup, other):
        one.run_to_end()
    assert setup.model.num_eager > 0
    assert news(canvases[0]) == news(canvases[1])


@pytest.mark.parametrize("captured", [False, True])
def test_a_window_or_a_token_that_is_none_ends_its_request(
    captured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A captured step is checked like any other."""
    from sglang_dllm.decoding.algorithms.full_attn_multi_block import ByEntropy

    decide = ByEntropy.decide

    def unknown(self: Any, inputs: Any) -> Any:
        decision = decide(self, inputs)
        return type(decision)(decision.accepted, decision.tokens + 10_000)

    monkeypatch.setattr(ByEntropy, "decide", unknown)
    setup = Setup(captured)
    canvas = setup.add(1)
    setup.run_to_end()
    assert "outside the vocabulary" in str(canvas.failure)
    assert (setup.model.num_captured > 0) == captured


def test_an_algorithm_that_fails_at_the_capture_is_not_captured(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from sglang_dllm.decoding.algorithms.full_attn_multi_block import ByEntropy

    def raising(self: Any, inputs: Any) -> Any:
        raise ValueError("told to fail")

    monkeypatch.setattr(ByEntropy, "decide", raising)
    with pytest.raises(ValueError, match="told to fail"):
        Setup(True)
