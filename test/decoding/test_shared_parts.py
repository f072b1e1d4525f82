"""Parts that all algorithms share: prediction, draws, random numbers, the canvas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

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
)
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.logits import Candidates, LogitsOf
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.prediction import plain_prediction, predict
from sglang_dllm.decoding.sampling import (
    Stream,
    counter_uniform,
    distribution,
    draw,
    filter_logits,
)
from sglang_dllm.decoding.statistics import MARGIN, PROBABILITY, Statistic
from sglang_dllm.decoding.tensor_rows import first_true


def inputs_of(logits: torch.Tensor, **others: Any) -> StepInputs[Any, Any]:
    """Logits of one canvas, all of whose positions are candidates."""
    length = len(logits)
    canvas = Canvas.from_prompt([], length, mask_id=MASK, eos_ids=(EOS,), **others)
    batch = CanvasBatch.of(canvas, Options(), facts_of("llada"), "cpu")
    zero = torch.zeros(length, dtype=torch.int64)
    places = torch.arange(length)
    step = whole_canvas_step(batch)
    return StepInputs(batch, step, zero, places, [length], held(logits))


def test_the_mask_token_is_never_predicted_and_the_measures_count_it() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, MASK] = 9.0
    logits[0, 7] = 1.0
    p = torch.softmax(logits[0].double(), -1)
    sure = plain_prediction(inputs_of(logits))
    assert sure.tokens.tolist() == [7]
    # One sum of powers is not rounded as torch's softmax is.
    assert float(sure.value[0]) == pytest.approx(float(p[7]), rel=1e-14)
    certain = plain_prediction(inputs_of(logits), Statistic("negative_entropy", 1e-12))
    assert certain.value[0] == (p * (p + 1e-12).log()).sum()


def test_the_margin_is_that_of_the_two_best_without_the_mask_token() -> None:
    p = torch.tensor([[0.1, 0.2, 0.0, 0.4, 0.25, 0.05]]).double()
    assert MARGIN.of(p, torch.tensor([4]), MASK).tolist() == [pytest.approx(0.05)]


def test_a_nan_row_measures_least() -> None:
    logits = torch.zeros(2, VOCAB)
    logits[0] = float("nan")
    values = plain_prediction(inputs_of(logits)).value
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


def test_draws_follow_temperature_top_k_and_top_p() -> None:
    n = 4000
    logits = torch.tensor([[2.0, 1.0, 0.0, 50.0, -1.0]]).repeat(n, 1)
    uniform = (torch.arange(n) + 0.5).double() / n

    def shares(
        temperature: float, top_p: float, top_k: int, min_p: float = 0.0
    ) -> torch.Tensor:
        p = distribution(
            logits,
            3,
            torch.full((n,), temperature, dtype=torch.float64),
            torch.full((n,), top_p, dtype=torch.float64),
            torch.full((n,), top_k),
            torch.full((n,), min_p, dtype=torch.float64),
        )
        return torch.bincount(draw(p, uniform), minlength=5).double() / n

    p = torch.softmax(torch.tensor([2.0, 1, 0, -torch.inf, -1]).double() / 0.7, -1)
    assert torch.allclose(shares(0.7, 1.0, 0), p, atol=1e-3)
    two = torch.softmax(torch.tensor([2.0, 1.0]).double(), -1)
    assert torch.allclose(shares(1.0, 1.0, 2)[:2], two, atol=1e-3)
    assert shares(1.0, 0.1, 0).tolist() == [1, 0, 0, 0, 0]
    assert shares(1e-3, 1.0, 0).tolist() == [1, 0, 0, 0, 0]
    # The second token has exp(-1) = 0.37 of the best one's probability.
    assert torch.allclose(shares(1.0, 1.0, 0, 0.36)[:2], two, atol=1e-3)
    assert shares(1.0, 1.0, 0, 0.37).tolist() == [1, 0, 0, 0, 0]
    # A temperature comes first: at 2 it is exp(-0.5) = 0.61.
    assert (shares(2.0, 1.0, 0, 0.6) > 0).sum() == 2


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([[0.5, 0.3, 0.2]]).double().log()
    one, zero = torch.ones(1).double(), torch.zeros(1).long()
    kept = filter_logits(logits, 0.6 * one, zero, 0 * one) > -torch.inf
    assert kept.tolist() == [[True, True, False]]
    # Ten equal tokens: two of them sum to exactly 0.2, and the third stays.
    even = (
        filter_logits(torch.zeros(1, 10).double(), 0.2 * one, zero, 0 * one)
        > -torch.inf
    )
    assert even.sum() == 3


def test_counter_uniform_is_uniform_and_keyed_by_all_its_arguments() -> None:
    i = torch.arange(20_000)
    zero = torch.zeros_like(i)
    for args in ((i, zero, zero), (zero, i, zero), (zero, zero, i)):
        u = counter_uniform(*args)
        assert u.min() >= 0 and u.max() < 1
        assert abs(u.mean() - 0.5) < 0.01
        assert len(u.unique()) == len(u)
    streams = torch.stack([counter_uniform(i, zero, zero, s) for s in Stream])
    between = torch.corrcoef(streams) - torch.eye(len(Stream), dtype=torch.float64)
    assert between.abs().max() < 0.03


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


class FirstTwo:
    """Proposes the token 3 for the first two candidates."""

    candidates = torch.tensor([0, 1])

    def edit(self, logits: torch.Tensor, some: Candidates) -> torch.Tensor:
        """The token 6 is never proposed."""
        return logits.index_fill(1, torch.tensor([6]), -torch.inf)

    def tokens(self, logits_of: LogitsOf) -> torch.Tensor:
        found = logits_of(self.candidates)
        assert found.shape == (2, VOCAB) and found.isfinite().all()
        return torch.tensor([3, 3])


def test_edits_come_behind_changes_and_proposed_tokens_are_measured() -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(4, VOCAB, generator=generator)
    bias = torch.zeros(VOCAB)
    bias[5] = 100.0
    plain = held(values)
    edited = plain.edited(lambda logits, some: logits + bias).proposed_by(FirstTwo())
    other = edited.changed(lambda some: edited.before_edits(some) * 2)
    every = torch.arange(4)
    assert torch.equal(edited.before_edits(every), values)
    wanted = (values * 2 + bias).index_fill(1, torch.tensor([6]), -torch.inf)
    assert torch.equal(other(every), wanted)
    tokens, value = other.measure(PROBABILITY, MASK)
    assert tokens.tolist() == [3, 3, 5, 5]
    p = wanted.double().softmax(dim=-1)
    torch.testing.assert_close(value, p[every, tokens])
    # The model's own, whatever was asked for.
    of_plain = plain.logprobs(every, tokens, MASK, 3)
    of_edited = edited.logprobs(every, tokens, MASK, 3)
    assert all(map(torch.equal, of_edited, of_plain))


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_prediction_takes_proposed_tokens_at_any_temperature(
    temperature: float,
) -> None:
    sampling = SamplingOptions(temperature=temperature, seed=3)
    logits = torch.zeros(4, VOCAB).index_fill_(1, torch.tensor([8]), 50.0)
    inputs = inputs_of(logits, sampling=sampling)
    proposed = inputs.logits.proposed_by(FirstTwo())
    found = predict(replace(inputs, logits=proposed))
    assert found.tokens.tolist() == [3, 3, 8, 8]
    assert (found.value[:2] < 1e-20).all() and (found.value[2:] > 0.99).all()
