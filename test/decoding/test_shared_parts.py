"""Parts that all algorithms share: prediction, draws, random numbers, the canvas."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from helpers import toy_model
from helpers.sync_detector import SyncDetector
from helpers.toy_model import (
    EOS,
    MASK,
    VOCAB,
    Request,
    ToyModel,
    answer,
    decode,
    facts_of,
    held,
    resolve,
)
from sglang_dllm.decoding.algorithm import StepInputs
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step, first_true
from sglang_dllm.decoding.denoiser import Denoiser
from sglang_dllm.decoding.logits import Logits
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.packing import PackedForward
from sglang_dllm.decoding.prediction import plain_prediction
from sglang_dllm.decoding.registry import algorithms
from sglang_dllm.decoding.sampling import (
    Stream,
    counter_uniform,
    distribution,
    draw,
    filter_logits,
)
from sglang_dllm.decoding.statistics import MARGIN, Statistic


def judged(logits: torch.Tensor) -> StepInputs:
    """Rows of one canvas, all of it candidates."""
    length = len(logits)
    canvas = Canvas.from_prompt([], length, mask_id=MASK, eos_ids=(EOS,))
    canvases = CanvasBatch.of(canvas, Options(), facts_of("llada"), "cpu")
    step = Step(canvases.masked, canvases.answer_len * 0, canvases.answer_len)
    zero = torch.zeros(length, dtype=torch.int64)
    places = torch.arange(length)
    return StepInputs(canvases, step, zero, places, [length], held(logits))


def test_the_mask_token_is_never_predicted_and_the_measures_count_it() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK] = 9.0
    logits[0, 7] = 1.0
    p = torch.softmax(logits[0].double(), -1)
    sure = plain_prediction(judged(logits))
    assert sure.tokens.tolist() == [7]
    assert sure.value[0] == p[7]
    certain = plain_prediction(judged(logits), Statistic("negative_entropy", 1e-12))
    assert certain.value[0] == (p * (p + 1e-12).log()).sum()


def test_the_margin_is_that_of_the_two_best_without_the_mask_token() -> None:
    p = torch.tensor([[0.1, 0.2, 0.0, 0.4, 0.25, 0.05]]).double()
    assert MARGIN.of(p, torch.tensor([4]), MASK).tolist() == [pytest.approx(0.05)]


def test_a_nan_row_measures_least() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0] = float("nan")
    values = plain_prediction(judged(logits)).value
    assert values[0] == -torch.inf
    assert values[1] > 0


def test_a_nan_row_does_not_stop_a_canvas() -> None:
    class Broken(ToyModel):
        def __call__(self, ids: torch.Tensor) -> torch.Tensor:
            logits = super().__call__(ids)
            logits[4] = float("nan")
            return logits

    for algorithm in ("FullAttnMultiBlock", "FastDLLM", "Credit", "AdaBlock"):
        request = Request(Broken(1), (1, 2), 6, algorithm, {})
        (canvas,) = decode("llada", [request])
        assert not canvas.masked.any(), algorithm


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_a_forward_may_know_the_statistics(family: str) -> None:
    """As in a CUDA graph. Other logits than the forward's are measured anew."""
    options: dict[str, list[dict[str, Any]]] = {name: [{}] for name in algorithms()}
    options["LLaDA"] += [{"cfg_scale": 1.5}, {"logits_eos_inf": True}]
    warm = SamplingOptions(temperature=0.8, seed=3)
    requests = [
        Request(ToyModel(seed, eos_bias=2.0), (1, 2), 20 + seed, name, chosen, sampling)
        for seed, (name, chosen, sampling) in enumerate(
            (name, chosen, sampling)
            for name, choices in options.items()
            for chosen in choices
            for sampling in (SamplingOptions(), warm)
        )
    ]
    answers = [
        [(c.ids.tolist(), c.num_forwards) for c in decode(family, requests, measures)]
        for measures in (False, True)
    ]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("family", ["llada", "dream"])
@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_a_step_asks_the_device_for_nothing(family: str, algorithm: str) -> None:
    """But by ``look``, once."""

    class Watched(Denoiser):
        def layout(self) -> PackedForward:
            with SyncDetector():
                return super().layout()

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


def test_committed_prefix_is_handed_out_once_and_in_order() -> None:
    canvas = Canvas.from_prompt([1, MASK], 4, mask_id=MASK, eos_ids=(EOS,))

    def commit(positions: list[int], tokens: list[int]) -> list[int]:
        canvas.ids[positions], canvas.masked[positions] = tokens, False
        return canvas.take_committed_prefix().tolist()

    assert commit([3], [8]) == []
    assert commit([2], [7]) == [7, 8]
    assert commit([4, 5], [9, 9]) == [9, 9]
    assert canvas.take_committed_prefix().tolist() == []
    assert not canvas.masked.any()


def test_first_true_is_the_width_where_nothing_is_true() -> None:
    values = torch.tensor([[False, True, True], [False, False, False]])
    assert first_true(values).tolist() == [1, 3]
    assert first_true(values[:, :0]).tolist() == [0, 0]


def test_a_canvas_set_aside_goes_on_where_it_was() -> None:
    """As a retracted request does; the others of its group go on meanwhile."""
    facts = facts_of("llada")

    def canvas_of(length: int) -> Canvas:
        return Canvas.from_prompt([1], length, mask_id=MASK, eos_ids=(EOS,))

    def answers(interrupted: bool) -> list[list[int]]:
        decoder = Denoiser(facts)
        canvases = [canvas_of(17), canvas_of(30)]
        model = ToyModel(5, eos_bias=-50.0)
        for canvas in canvases:
            options = {"block_size": 8, "cache": "dual"}
            found = resolve("llada", Request(model, (1,), 0, "Credit", options))
            decoder.add(canvas, found.algorithm, found.options)
        put_back = None
        for step in range(60):
            if interrupted and step == 3:
                put_back = decoder.set_aside(canvases[1])
                assert decoder.canvases == canvases[:1]
            if put_back and step == 9:
                put_back()
                assert canvases[1].window == (0, 31)
            decoder.remove([canvas for canvas in canvases if canvas.done])
            if not decoder.canvases:
                break
            layout = decoder.layout()
            rows = layout.input_ids.split(layout.lens)
            # Whole canvases, whatever the window: the cache does not show.
            packed = [
                model(torch.from_numpy(row.canvas.ids))[slice(*row.canvas.window)]
                for row, _ in zip(layout.rows, rows, strict=True)
            ]
            decoder.commit(held(torch.cat(packed)[layout.logits_indices]))
            decoder.look()
        return [canvas.ids.tolist() for canvas in canvases]

    assert answers(interrupted=True) == answers(interrupted=False)


@pytest.mark.parametrize("comes_back", [False, True])
def test_a_canvas_that_comes_while_a_forward_runs_waits_for_it(
    comes_back: bool,
) -> None:
    """New, or set aside before: the forward that is laid out stays the others'."""
    facts = facts_of("llada")
    model = ToyModel(5, eos_bias=-50.0)
    request = Request(model, (1,), 0, "Credit", {"block_size": 8, "cache": "dual"})
    found = resolve("llada", request)
    decoder = Denoiser(facts)
    canvases = [
        Canvas.from_prompt([1], length, mask_id=MASK, eos_ids=(EOS,))
        for length in (17, 30)
    ]

    def step() -> None:
        layout = decoder.layout()
        rows = [
            model(torch.from_numpy(row.canvas.ids))[slice(*row.canvas.window)]
            for row in layout.rows
        ]
        decoder.commit(held(torch.cat(rows)[layout.logits_indices]))

    decoder.add(canvases[0], found.algorithm, found.options)
    enter = partial(decoder.add, canvases[1], found.algorithm, found.options)
    if comes_back:
        enter()
        for _ in range(3):
            step()
            decoder.look()
        enter = decoder.set_aside(canvases[1])
    num_before = canvases[1].num_forwards
    layout = decoder.layout()
    enter()
    assert decoder.layout() is layout and decoder.canvases == canvases[:1]
    step()
    decoder.look()
    assert decoder.canvases == canvases
    assert canvases[0].num_forwards == num_before + 1
    assert canvases[1].num_forwards == num_before
    assert canvases[1].window == (0, 31)  # all of it, with nothing kept
    while decoder.canvases:
        step()
        decoder.look()
        decoder.remove([canvas for canvas in canvases if canvas.done])
    exact = replace(request, options={"block_size": 8})
    alone = decode("llada", [replace(exact, length=n) for n in (17, 30)])
    assert [c.ids.tolist() for c in canvases] == [c.ids.tolist() for c in alone]


@pytest.mark.parametrize("algorithm", sorted(algorithms()))
def test_what_a_wide_canvas_needed_goes_with_it(algorithm: str) -> None:
    """Else one large request would slow down all that come after it."""
    facts, decoder = facts_of("llada"), Denoiser(facts_of("llada"))

    def add(length: int, **options: Any) -> Canvas:
        request = Request(ToyModel(5), (1,), length, algorithm, options)
        found = resolve("llada", request)
        canvas = Canvas.from_prompt(
            [1], length, mask_id=facts.mask_id, eos_ids=facts.eos_ids
        )
        decoder.add(canvas, found.algorithm, found.options)
        return canvas

    def sizes() -> dict[str, torch.Size]:
        (group,) = decoder._groups.values()
        return {name: t.shape for name, t in group.canvases._tensors().items()}

    add(20)
    add(24)
    before = sizes()
    large = add(300)
    assert sizes()["ids"] == (3, 300)
    decoder.remove([large])
    assert sizes() == before


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    n = 4000
    logits = torch.tensor([[2.0, 1.0, 0.0, 50.0, -1.0]]).repeat(n, 1)
    uniform = (torch.arange(n) + 0.5).double() / n

    def shares(temperature: float, top_p: float, top_k: int) -> torch.Tensor:
        p = distribution(
            logits,
            3,
            torch.full((n,), temperature, dtype=torch.float64),
            torch.full((n,), top_p, dtype=torch.float64),
            torch.full((n,), top_k),
        )
        return torch.bincount(draw(p, uniform), minlength=5).double() / n

    p = torch.softmax(torch.tensor([2.0, 1, 0, -torch.inf, -1]).double() / 0.7, -1)
    assert torch.allclose(shares(0.7, 1.0, 0), p, atol=1e-3)
    two = torch.softmax(torch.tensor([2.0, 1.0]).double(), -1)
    assert torch.allclose(shares(1.0, 1.0, 2)[:2], two, atol=1e-3)
    assert shares(1.0, 0.1, 0).tolist() == [1, 0, 0, 0, 0]
    assert shares(1e-3, 1.0, 0).tolist() == [1, 0, 0, 0, 0]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    one, zero = torch.ones(1).double(), torch.zeros(1).long()
    kept = filter_logits(logits, 0.6 * one, zero) > -torch.inf
    assert kept.tolist() == [[True, True, False]]
    # Ten equal tokens: two of them sum to exactly 0.2, and the third stays.
    even = filter_logits(torch.zeros(1, 10).double(), 0.2 * one, zero) > -torch.inf
    assert even.sum() == 3


def test_counter_uniform_is_uniform_and_keyed_by_all_its_arguments() -> None:
    i = torch.arange(20_000)
    zero = torch.zeros_like(i)
    for args in ((i, zero, zero), (zero, i, zero), (zero, zero, i)):
        u = counter_uniform(*args)
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01
        assert len(u.unique()) == len(u)
    token, order = (counter_uniform(i, zero, zero, s) for s in Stream)
    assert abs(float(torch.corrcoef(torch.stack([token, order]))[0, 1])) < 0.03


@pytest.mark.parametrize("family", ["llada", "dream"])
def test_sampling_repeats_with_its_seed_alone_and_in_a_crowd(family: str) -> None:
    def request(index: int, seed: int) -> Request:
        return Request(
            ToyModel(index, eos_bias=-50.0),
            (1,) * (index + 1),
            20 - 3 * index,
            ("FullAttnMultiBlock", "LLaDA", "Dream")[index],
            {},
            SamplingOptions(temperature=1.5, seed=seed),
        )

    for index in range(3):
        crowd = decode(family, [request(i, 7) for i in range(3)])
        (alone,) = decode(family, [request(index, 7)])
        (other,) = decode(family, [request(index, 8)])
        assert answer(crowd[index]) == answer(alone)
        assert answer(alone) != answer(other)


@pytest.mark.parametrize(
    ("algorithm", "options"),
    [("LLaDA", {"remasking": "random"}), ("Dream", {"alg": "origin"})],
)
def test_a_random_order_comes_from_the_seed(
    algorithm: str, options: dict[str, str]
) -> None:
    def tokens(seed: int) -> list[int]:
        sampling = SamplingOptions(seed=seed)
        request = Request(ToyModel(3), (1, 2), 24, algorithm, options, sampling)
        return answer(decode("llada", [request])[0])

    assert tokens(1) == tokens(1)
    assert tokens(1) != tokens(2)
