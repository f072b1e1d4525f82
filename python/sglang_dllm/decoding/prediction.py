"""The token of every candidate, and how sure the model is of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.decision import StepInputs
from sglang_dllm.decoding.sampling import Stream, counter_uniform, distribution, draw
from sglang_dllm.decoding.statistics import (
    DRAW_ELEMENTS,
    PROBABILITY,
    Statistic,
    row_chunks,
)

Inputs: TypeAlias = StepInputs[Any, Any]


@dataclass(frozen=True)
class Prediction:
    """``tokens``: (N,) int64. ``value``: (N,) float64, the greatest is the best.

    Nobody may write to them: another prediction of the step may be the same tensors.
    """

    tokens: torch.Tensor
    value: torch.Tensor


def predict(
    inputs: Inputs, statistic: Statistic = PROBABILITY, *, of_drawn: bool = False
) -> Prediction:
    """Predict a token for each candidate and measure it.

    The token is the argmax of the logits without the mask token, or a draw where the
    canvas has a temperature. A proposed token takes the place of both. Logits with a
    NaN measure as minus infinity, so that a broken candidate is never accepted before a
    sound one and never blocks progress.

    Args:
        statistic: reads the probabilities of a candidate.
        of_drawn: at a temperature, read the distribution that the token is drawn
            from (Dream's samplers) instead of the plain softmax (LLaDA's).
    """
    best = plain_prediction(inputs, statistic)
    records = inputs.batch.records
    drawn = inputs.candidates_of([not canvas.sampling.greedy for canvas in records])
    if drawn is None:
        return best
    tokens, value = best.tokens.clone(), best.value.clone()
    mask_id, sampling = inputs.facts.mask_id, inputs.batch.sampling
    uniform = uniforms(inputs, Stream.TOKEN)[drawn]
    temperature = inputs.per_candidate(sampling.temperature)[drawn]
    top_p = inputs.per_candidate(sampling.top_p)[drawn]
    top_k = inputs.per_candidate(sampling.top_k)[drawn]
    min_p = inputs.per_candidate(sampling.min_p)[drawn]
    for part in row_chunks(len(drawn), inputs.facts.vocab_size, DRAW_ELEMENTS):
        some = drawn[part]
        logits = inputs.logits(some)
        cuts = top_p[part], top_k[part], min_p[part]
        p = distribution(logits, mask_id, temperature[part], *cuts)
        tokens[some] = draw(p, uniform[part])
        tokens = inputs.logits.with_proposed(tokens)
        if not of_drawn:
            p = logits.double().softmax(dim=-1)
        found = statistic.of(p, tokens[some], mask_id)
        value[some] = found.masked_fill(found.isnan(), -torch.inf)
    return Prediction(tokens, value)


def plain_prediction(inputs: Inputs, statistic: Statistic = PROBABILITY) -> Prediction:
    """As ``predict`` at temperature 0, for every canvas."""
    if not inputs.num_candidates:
        nothing = torch.zeros_like(inputs.positions)
        return Prediction(nothing, nothing.double())
    return Prediction(*inputs.logits.measure(statistic, inputs.facts.mask_id))


def confidence(inputs: Inputs) -> Prediction:
    """Tokens and their probabilities, by the sampler family."""
    return predict(inputs, of_drawn=inputs.facts.family.sampler_family == "Dream")


def uniforms(inputs: Inputs, stream: Stream) -> torch.Tensor:
    """``(N,)`` float64 in [0, 1): each candidate's own random number of this step."""
    return counter_uniform(
        inputs.per_candidate(inputs.batch.sampling.seed),
        inputs.per_candidate(inputs.batch.rows.num_forwards),
        inputs.positions,
        stream,
    )
