"""The denoiser: canvases that come, leave, return and fail, step by step."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from helpers import toy_model
from helpers.sync_detector import SyncDetector
from helpers.toy_model import Request, ToyModel, decode, facts_of, held, resolve
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import Group
from sglang_dllm.decoding.logits import HeadError, Logits
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows

MODEL = ToyModel(5, eos_bias=-50.0)


def prepare(
    denoiser: Denoiser, length: int, algorithm: str = "Credit", **options: Any
) -> tuple[Canvas, Group]:
    """A canvas of one prompt token and ``length`` masks, ready to join."""
    request = Request(MODEL, (1,), length, algorithm, options)
    decoding = resolve("llada", request)
    canvas = decoding.new_canvas((1,), length, denoiser.facts)
    return canvas, denoiser.prepare(canvas, decoding)


def forward(packed: PackedForward) -> Logits:
    """Logits of the packed windows, computed over the whole canvases.

    The windows get exact logits whatever the cache, so the cache does not show.
    """
    parts = [
        MODEL(torch.from_numpy(canvas.ids))[window.start : window.end]
        for window, canvas in zip(packed.windows, packed.canvases, strict=True)
    ]
    return held(torch.cat(parts)[packed.logits_indices])


def step(denoiser: Denoiser, *, arrivals: tuple[Group, ...] = ()) -> None:
    denoiser.commit(forward(denoiser.pack()))
    for group in arrivals:
        denoiser.join(group)
    denoiser.sync()


def finish(denoiser: Denoiser, canvases: list[Canvas]) -> list[list[int]]:
    """Decode until every canvas is full or failed."""
    for _ in range(200):
        denoiser.remove([c for c in canvases if c.done or c.failure])
        if not denoiser.canvases:
            break
        step(denoiser)
    return [canvas.ids.tolist() for canvas in canvases]


CACHED: dict[str, Any] = {"block_size": 8, "cache": "dual"}


def test_a_parked_canvas_goes_on_where_it_was() -> None:
    """As a retracted request does. The others of its group go on meanwhile."""
    denoiser = Denoiser(facts_of("llada"))
    pairs = [prepare(denoiser, length, **CACHED) for length in (17, 30)]
    canvases = [canvas for canvas, _ in pairs]
    for _, group in pairs:
        denoiser.join(group)
    denoiser.sync()
    for _ in range(3):
        step(denoiser)
    parked = denoiser.park(canvases[1])
    assert denoiser.canvases == canvases[:1]
    before = canvases[1].num_forwards
    for _ in range(4):
        step(denoiser)
    assert canvases[1].num_forwards == before
    denoiser.join(parked)
    denoiser.sync()
    assert canvases[1].window == (0, 31)
    exact = Request(MODEL, (1,), 0, "Credit", {"block_size": 8})
    alone = decode("llada", [replace(exact, length=n) for n in (17, 30)])
    assert finish(denoiser, canvases) == [canvas.ids.tolist() for canvas in alone]


def test_a_canvas_that_joins_behind_a_commit_starts_with_the_next_forward() -> None:
    denoiser = Denoiser(facts_of("llada"))
    first, group = prepare(denoiser, 17, **CACHED)
    denoiser.join(group)
    denoiser.sync()
    step(denoiser)
    second, arrival = prepare(denoiser, 30, **CACHED)
    step(denoiser, arrivals=(arrival,))
    assert denoiser.canvases == [first, second]
    assert (first.num_forwards, second.num_forwards) == (2, 0)
    assert second.window == (0, 31)
    exact = Request(MODEL, (1,), 0, "Credit", {"block_size": 8})
    alone = decode("llada", [replace(exact, length=n) for n in (17, 30)])
    assert finish(denoiser, [first, second]) == [c.ids.tolist() for c in alone]


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_what_a_wide_canvas_needed_leaves_with_it(algorithm: str) -> None:
    """Else one large request would slow down all that come after it."""
    denoiser = Denoiser(facts_of("llada"))

    def join(length: int) -> Canvas:
        canvas, group = prepare(denoiser, length, algorithm)
        denoiser.join(group)
        return canvas

    def sizes() -> list[dict[str, torch.Size]]:
        (group,) = denoiser._groups.values()
        parts = (group.batch.rows, group.batch.state, group.cache_state)
        return [{n: t.shape for n, t in part.tensors().items()} for part in parts]

    join(20)
    join(24)
    before = sizes()
    large = join(300)
    assert sizes()[0]["ids"] == (3, 300)
    denoiser.remove([large])
    assert sizes() == before


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_a_step_asks_the_device_for_nothing(family: str, algorithm: str) -> None:
    """Only ``sync`` waits, once a step."""

    class Watched(Denoiser):
        def pack(self) -> PackedForward:
            with SyncDetector():
                return super().pack()

        def commit(self, logits: Logits) -> None:
            with SyncDetector():
                super().commit(logits)

    caches = algorithms()[algorithm].caches
    guided = {"cfg_scale": 1.0, "confidence_eos_eot_inf": True, "logits_eos_inf": True}
    asked: list[dict[str, Any]] = [{"cache": cache} for cache in caches]
    asked += [guided] if algorithm == "LLaDA" else [{"max_forwards": 3}]
    warm = SamplingOptions(temperature=0.7, top_p=0.9, top_k=3, seed=3)
    samplings = [SamplingOptions(), warm]
    requests = [
        Request(ToyModel(index), (1, 2), 12, algorithm, options, sampling)
        for index, options in enumerate(asked)
        for sampling in samplings
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy_model, "Denoiser", Watched)
        watched = decode(family, requests)
    expected = decode(family, requests)
    assert [c.ids.tolist() for c in watched] == [c.ids.tolist() for c in expected]
    with pytest.raises(RuntimeError, match="reads a value"), SyncDetector():
        torch.ones(2).sum().item()
    with pytest.raises(RuntimeError, match="by a mask"), SyncDetector():
        torch.ones(2)[torch.tensor([True, False])]


@dataclass
class OtherState(TensorRows):
    other: torch.Tensor


def raises(error: Exception) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        raise error

    return method


@pytest.mark.parametrize("where", ["next_step", "decide", "on_commit"])
def test_an_algorithm_that_raises_ends_its_own_requests(
    where: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    denoiser = Denoiser(facts_of("llada"))
    faulty, group = prepare(denoiser, 9, "LocalLeap")
    sound, other = prepare(denoiser, 9, "FastDLLM")
    denoiser.join(group)
    denoiser.join(other)
    denoiser.sync()
    step(denoiser)
    kind = type(algorithms()["LocalLeap"])
    monkeypatch.setattr(kind, where, raises(RuntimeError("told to fail")))
    with caplog.at_level(logging.CRITICAL):
        step(denoiser)
    assert faulty.failure == "LocalLeap: told to fail"
    assert denoiser.canvases == [sound] and sound.failure is None
    (alone,) = decode("llada", [Request(MODEL, (1,), 9, "FastDLLM", {})])
    assert finish(denoiser, [sound]) == [alone.ids.tolist()]


@pytest.mark.parametrize("change", ["class", "dtype"])
def test_a_state_that_changes_ends_the_newcomer_only(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    denoiser = Denoiser(facts_of("llada"))
    first, group = prepare(denoiser, 9, "LocalLeap")
    second, arrival = prepare(denoiser, 9, "LocalLeap")
    denoiser.join(group)
    if change == "class":
        arrival.batch.start(OtherState(torch.zeros(1)))
    else:
        arrival.batch.state.radius = arrival.batch.state.radius.double()
    denoiser.join(arrival)
    denoiser.sync()
    assert first.failure is None and denoiser.canvases == [first]
    assert second.failure is not None and "LocalLeap" in second.failure


def test_a_wrong_shape_ends_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    denoiser = Denoiser(facts_of("llada"))
    canvas, group = prepare(denoiser, 9, "LocalLeap")
    denoiser.join(group)
    denoiser.sync()
    kind = type(algorithms()["LocalLeap"])
    decide = kind.decide

    def short(self: Any, inputs: Any) -> Any:
        decision = decide(self, inputs)
        return replace(decision, accepted=decision.accepted[1:])

    monkeypatch.setattr(kind, "decide", short)
    step(denoiser)
    assert "accepted and tokens must have the shape (9,)" in str(canvas.failure)


def test_a_failure_of_the_head_or_the_device_is_not_swallowed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Other ranks wait in the collectives of the head."""
    for error in (
        torch.OutOfMemoryError("no memory"),
        RuntimeError("CUDA error: an illegal memory access was encountered"),
    ):
        denoiser = Denoiser(facts_of("llada"), agree=lambda event: None)
        _, group = prepare(denoiser, 9, "LocalLeap")
        denoiser.join(group)
        denoiser.sync()
        kind = type(algorithms()["LocalLeap"])
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            patch.setattr(kind, "decide", raises(error))
            step(denoiser)
    denoiser = Denoiser(facts_of("llada"))
    # At a temperature the algorithm asks for logits itself.
    for sampling in (SamplingOptions(), SamplingOptions(temperature=1.0)):
        decoding = resolve("llada", Request(MODEL, (1,), 9, "LocalLeap", {}))
        canvas = decoding.new_canvas((1,), 9, denoiser.facts, sampling=sampling)
        denoiser.join(denoiser.prepare(canvas, decoding))
    denoiser.sync()
    hidden = torch.zeros(len(denoiser.pack().logits_indices), 4)
    head = raises(ValueError("the head failed"))
    with pytest.raises(HeadError, match="the head failed"):
        denoiser.commit(Logits.of_hidden(hidden, head, denoiser.facts.vocab_size))


def test_the_statistics_are_computed_outside_of_the_guard(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The head has collectives, and a guard that catches an error skips them."""
    inside = False

    def decide(self: Any, inputs: Any) -> Any:
        nonlocal inside
        inside = True
        raise RuntimeError("told to fail")

    denoiser = Denoiser(facts_of("llada"))
    _, group = prepare(denoiser, 9, "LocalLeap")
    denoiser.join(group)
    denoiser.sync()
    asked: list[bool] = []
    table = MODEL(torch.arange(9))

    def logits_of(some: Any) -> torch.Tensor:
        asked.append(inside)
        return table[some]

    monkeypatch.setattr(type(algorithms()["LocalLeap"]), "decide", decide)
    denoiser.pack()
    denoiser.commit(Logits(9, denoiser.facts.vocab_size, logits_of))
    assert asked == [False]


def test_a_window_or_a_token_that_is_none_ends_its_own_request(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A window of negative length would shift the tokens of all other requests."""
    kind = type(algorithms()["LocalLeap"])
    next_step, decide = kind.next_step, kind.decide

    def backwards(self: Any, batch: Any) -> Any:
        made = next_step(self, batch)
        return Step(made.candidates, made.end, made.start)

    def unknown(self: Any, inputs: Any) -> Any:
        decision = decide(self, inputs)
        return replace(decision, tokens=decision.tokens + 10_000)

    for name, method, message in (
        ("next_step", backwards, "decodes no window"),
        ("decide", unknown, "outside the vocabulary"),
    ):
        denoiser = Denoiser(facts_of("llada"))
        faulty, group = prepare(denoiser, 9, "LocalLeap", cache="dual", block_size=3)
        sound, other = prepare(denoiser, 9, "FastDLLM", cache="dual", block_size=3)
        denoiser.join(group)
        denoiser.join(other)
        denoiser.sync()
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, method)
            for _ in range(3):  # the first window of a span is full
                if faulty.failure is None:
                    step(denoiser)
        assert message in str(faulty.failure)
        assert sound.failure is None
        finish(denoiser, [faulty, sound])
        assert not sound.masked.any()


def test_a_message_that_raises_does_not_escape(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no message")

    denoiser = Denoiser(facts_of("llada"))
    canvas, group = prepare(denoiser, 9, "LocalLeap")
    denoiser.join(group)
    denoiser.sync()
    monkeypatch.setattr(type(algorithms()["LocalLeap"]), "decide", raises(Mute()))
    step(denoiser)
    assert canvas.failure == "LocalLeap: Mute"


def test_changed_logits_are_measured_once() -> None:
    """Else the head would run twice over every candidate."""
    denoiser = Denoiser(facts_of("llada"))
    _, group = prepare(denoiser, 9, "LLaDA", logits_eos_inf=True)
    denoiser.join(group)
    denoiser.sync()
    table, asked = MODEL(torch.arange(9)), []

    def logits_of(some: Any) -> torch.Tensor:
        asked.append(some)
        return table[some]

    denoiser.pack()
    denoiser.commit(Logits(9, denoiser.facts.vocab_size, logits_of))
    assert len(asked) == 1
