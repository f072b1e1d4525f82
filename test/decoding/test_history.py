"""The history of a watched canvas: each commit, with its confidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from helpers.toy_model import EOS, Request, ToyModel, facts_of, held, resolve
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import NUM_NUMBERS, Group
from sglang_dllm.decoding.history import History, ranges
from sglang_dllm.decoding.registry import algorithms

PROMPT = (1, 2)
# An EOS comes often, so that rules fill what is behind it.
MODEL = ToyModel(5, eos_bias=2.0)


def make(
    denoiser: Denoiser,
    length: int,
    algorithm: str,
    *,
    family: str = "llada",
    is_watched: bool = True,
    temperature: float = 0.0,
    **options: Any,
) -> tuple[Canvas, Group]:
    request = Request(MODEL, PROMPT, length, algorithm, options)
    decoding = resolve(family, request)
    sampling = SamplingOptions(temperature=temperature, seed=3)
    canvas = decoding.new_canvas(PROMPT, length, denoiser.facts, sampling=sampling)
    if is_watched:
        canvas.watch()
    return canvas, denoiser.prepare(canvas, decoding)


def step(denoiser: Denoiser, *arrivals: Group) -> None:
    """A forward over all canvases, and its commit. ``arrivals`` come meanwhile."""
    denoiser.commit(MODEL.forward(denoiser.pack()))
    for group in arrivals:
        denoiser.join(group)
    denoiser.sync()


@pytest.mark.parametrize("temperature", [0.0, 0.7])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_each_commit_is_there_with_its_probability(
    family: str, algorithm: str, temperature: float
) -> None:
    """A watched canvas beside others, which have no history and the same tokens."""
    denoiser = Denoiser(facts_of(family))
    asked: dict[str, Any] = {"family": family, "temperature": temperature}
    if algorithm == "LLaDA":
        asked["cfg_scale"] = 1.5
    watched, group = make(denoiser, 20, algorithm, **asked)
    plain, other = make(denoiser, 31, algorithm, is_watched=False, **asked)
    denoiser.join(group)
    denoiser.sync()
    history, shown = watched.history, [-1] * 20
    assert history is not None and not history.has_news
    for number in range(1, 200):
        before = watched.ids.tolist()
        step(denoiser, *([other] if number == 2 else []))
        table = MODEL.logprobs(before, len(PROMPT), denoiser.facts.family.shift)
        (last,) = history.steps[number - 1 :]
        assert last.forward == number and not last.taken_back
        found = zip(last.positions, last.tokens, last.logprobs, strict=True)
        for position, token, logprob in found:
            was_there = shown[position] != -1
            shown[position] = token
            if math.isnan(logprob):
                assert token == EOS, "filled by a rule"
            else:
                assert not was_there
                wanted = table[position, token].item()
                assert logprob == pytest.approx(wanted, abs=1e-9)
        if watched.done:
            break
    assert shown == watched.ids[len(PROMPT) :].tolist()
    decided = [p for one in history.steps for p in one.logprobs if not math.isnan(p)]
    assert 0 < len(decided) <= watched.num_committed
    assert plain.history is None
    for _ in range(200):
        if plain.done:
            break
        step(denoiser)
    assert plain.ids.tolist() == alone(31, algorithm, **asked)


def alone(length: int, algorithm: str, **asked: Any) -> list[int]:
    denoiser = Denoiser(facts_of(asked["family"]))
    canvas, group = make(denoiser, length, algorithm, is_watched=False, **asked)
    denoiser.join(group)
    denoiser.sync()
    for _ in range(200):
        if canvas.done:
            break
        step(denoiser)
    return canvas.ids.tolist()


def test_who_is_not_watched_pays_nothing() -> None:
    denoiser = Denoiser(facts_of("llada"))
    _, group = make(denoiser, 20, "FullAttnMultiBlock", is_watched=False)
    denoiser.join(group)
    denoiser.sync()
    step(denoiser)
    (only,) = denoiser._groups.values()
    assert only.revealed is None and only.steering is not None
    assert only.table().shape == (1, NUM_NUMBERS + 20)
    seen, arrival = make(denoiser, 24, "FullAttnMultiBlock")
    step(denoiser, arrival)
    step(denoiser)
    (only,) = denoiser._groups.values()
    assert only.steering is None, "a captured step measures nothing"
    assert only.table().shape == (2, NUM_NUMBERS + 24)
    denoiser.remove([seen])
    (only,) = denoiser._groups.values()
    assert only.table().shape == (1, NUM_NUMBERS + 20)
    step(denoiser)
    (only,) = denoiser._groups.values()
    assert only.table().shape == (1, NUM_NUMBERS + 20)


def test_a_parked_canvas_keeps_its_history() -> None:
    denoiser = Denoiser(facts_of("llada"))
    canvas, group = make(denoiser, 20, "Credit")
    denoiser.join(group)
    denoiser.sync()
    step(denoiser)
    assert canvas.history is not None and canvas.history.take_news()[0] == 0
    parked = denoiser.park(canvas)
    denoiser.join(parked)
    denoiser.sync()
    assert not canvas.history.has_news
    step(denoiser)
    first, steps = canvas.history.take_news()
    assert first == 1 and [one["forward"] for one in steps] == [2]


def test_nan_logits_are_no_rule() -> None:
    """A row with a NaN has the least confidence; only a rule has none."""
    logits = held(torch.tensor([[0.0, torch.nan, 0.0], [0.0, 0.0, 0.0]]))
    some = torch.tensor([0, 1])
    found, _, _ = logits.logprobs(some, torch.tensor([0, 0]), mask_id=2)
    assert found.tolist() == [-math.inf, pytest.approx(-math.log(2))]


def test_positions_that_are_masks_again() -> None:
    history = History()
    history.note(1, np.array([-1, -1, 5]), np.array([-1, 4, 5]), None)
    history.note(1, np.array([-1, 4, 5]), np.array([-1, 4, 5]), None)
    assert len(history.steps) == 1, "nothing happened"
    history.note_resize(2, 0, 4)
    history.note(2, np.array([-1, 4, 5]), np.array([7, 4, -1]), None, first=8)
    first, resized, last = history.steps
    assert (first.positions, first.tokens) == ([1], [4])
    assert resized.to_dict() == {
        "forward": 1,
        "committed": [],
        "taken_back": [],
        "resized": [2, 0, 4],
    }
    assert (last.positions, last.taken_back) == ([8], [10])
    assert last.to_dict()["committed"][0][:2] == (8, 7)


def test_ranges() -> None:
    flags = [True, True, False, True, False, False, True]
    assert ranges(np.array(flags)) == [[0, 2], [3, 4], [6, 7]]
    assert ranges(np.zeros(3, dtype=np.bool_)) == []
