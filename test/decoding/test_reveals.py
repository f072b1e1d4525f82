"""Log-probabilities of tokens at the forward that committed each of them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from helpers.toy_model import EOS, MASK, Request, ToyModel, facts_of, resolve
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.group import NUM_NUMBERS, Group
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.reveals import UNLIKELIEST, Revealed, Reveals

PROMPT = (1, 2)
MODEL = ToyModel(5, eos_bias=2.0)
GIVEN = (4, None, None, 8) + (None,) * 12
"""A template: two positions are the request's own."""


def make(
    denoiser: Denoiser, algorithm: str, num_top: int | None, **asked: Any
) -> tuple[Canvas, Group]:
    """A canvas of 16 positions; ``num_top`` None asks for no log-probabilities."""
    sampling = SamplingOptions(temperature=asked.pop("temperature", 0.0), seed=3)
    template = asked.pop("template", None)
    family = "dream" if denoiser.facts.family.shift else "llada"
    request = Request(MODEL, PROMPT, 16, algorithm, asked, template=template)
    decoding = resolve(family, request)
    canvas = decoding.new_canvas(
        PROMPT,
        16,
        denoiser.facts,
        sampling=sampling,
        template=template and [-1 if one is None else one for one in template],
    )
    if num_top is not None:
        canvas.reveal(num_top)
    return canvas, denoiser.prepare(canvas, decoding)


def step(denoiser: Denoiser) -> None:
    denoiser.commit(MODEL.forward(denoiser.pack()))
    denoiser.sync()


def run(denoiser: Denoiser, canvases: list[Canvas]) -> list[dict[int, torch.Tensor]]:
    """Decode all, and note each position's row at the forward that committed it."""
    wanted: list[dict[int, torch.Tensor]] = [{} for _ in canvases]
    for _ in range(200):
        before = [canvas.ids.tolist() for canvas in canvases]
        step(denoiser)
        for canvas, ids, found in zip(canvases, before, wanted, strict=True):
            start = len(PROMPT)
            rows = MODEL.logprobs(ids, start, denoiser.facts.family.shift)
            for i in range(16):
                was, now = ids[start + i], int(canvas.ids[start + i])
                if was == MASK and now != MASK:
                    found[i] = rows[i]
        if all(canvas.done for canvas in canvases):
            break
    return wanted


@pytest.mark.parametrize("temperature", [0.0, 0.8])
@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_each_token_has_those_of_its_forward(
    family: str, algorithm: str, temperature: float
) -> None:
    """Canvases of one group: three ask for different numbers, and one does not."""
    denoiser = Denoiser(facts_of(family))
    asked: dict[str, Any] = {"temperature": temperature}
    if algorithm == "LLaDA":
        asked["cfg_scale"] = 1.5
    made = [make(denoiser, algorithm, num_top, **asked) for num_top in (3, None, 0)]
    made.append(make(denoiser, algorithm, 2, template=GIVEN, **asked))
    for _, group in made:
        denoiser.join(group)
    denoiser.sync()
    canvases = [canvas for canvas, _ in made]
    wanted = run(denoiser, canvases)
    assert canvases[1].reveals is None
    num_decided = 0
    for canvas, num_top, rows in zip(canvases, (3, None, 0, 2), wanted, strict=True):
        if num_top is None or canvas.reveals is None:
            continue
        for i in range(16):
            token = int(canvas.ids[len(PROMPT) + i])
            if token == MASK:
                continue
            value, ids, values = canvas.reveals.of(i, token)
            if (num_top and (ids, values) == ([token], [0.0])) or value == 0.0:
                is_given = canvas.fixed[len(PROMPT) + i]
                assert is_given or token == EOS, "filled by a rule"
                continue
            num_decided += 1
            assert value == pytest.approx(rows[i][token].item(), abs=1e-9)
            best = rows[i].topk(num_top).values.tolist()
            assert values == pytest.approx(best, abs=1e-9)
            assert values == pytest.approx(rows[i][ids].tolist(), abs=1e-9)
            assert MASK not in ids
    assert num_decided > 10


def test_who_does_not_ask_pays_nothing() -> None:
    denoiser = Denoiser(facts_of("llada"))
    plain, group = make(denoiser, "FullAttnMultiBlock", None)
    denoiser.join(group)
    denoiser.sync()
    step(denoiser)
    (only,) = denoiser._groups.values()
    assert only.revealed is None and only.steering is not None
    assert only.table().shape == (1, NUM_NUMBERS + 16)
    asks, group = make(denoiser, "FullAttnMultiBlock", 4)
    denoiser.join(group)
    denoiser.sync()
    (only,) = denoiser._groups.values()
    assert only.steering is None, "a captured step measures nothing"
    step(denoiser)
    (only,) = denoiser._groups.values()
    assert only.table().shape == (2, NUM_NUMBERS + 16)
    assert only.revealed is None, "it keeps the logits of a step alive"
    assert plain.reveals is None and asks.reveals is not None


def test_a_parked_canvas_keeps_them() -> None:
    denoiser = Denoiser(facts_of("llada"))
    canvas, group = make(denoiser, "Credit", 1)
    denoiser.join(group)
    denoiser.sync()
    step(denoiser)
    assert canvas.reveals is not None
    known = [canvas.reveals.of(i, 0) for i in range(16)]
    denoiser.join(denoiser.park(canvas))
    denoiser.sync()
    assert [canvas.reveals.of(i, 0) for i in range(16)] == known


def revealed(position: int, logprob: float) -> Revealed:
    one = np.array([[logprob, -7.0]])
    return Revealed(np.array([position]), one[0, :1], np.array([[4, 6]]), one)


def test_the_last_commit_counts() -> None:
    found = Reveals(4, 2)
    masked = np.full(4, -1)
    first, second = masked.copy(), masked.copy()
    first[2], second[2] = 4, 6
    found.note(masked, first, revealed(2, -0.5))
    assert found.of(2, 4) == (-0.5, [4, 6], [-0.5, -7.0])
    found.note(first, masked, None)
    assert found.of(2, 5) == (0.0, [5], [0.0]), "taken back, then filled by a rule"
    found.note(masked, second, revealed(2, -math.inf))
    assert found.of(2, 6)[0] == UNLIKELIEST
    found.replace(1, 1, 3)
    assert found.of(4, 6)[0] == UNLIKELIEST and found.of(1, 5) == (0.0, [5], [0.0])
    part = Reveals(4, 1)
    part.note(masked[:2], np.array([4, -1]), revealed(0, -0.5), first=2)
    assert part.of(2, 4) == (-0.5, [4], [-0.5])
