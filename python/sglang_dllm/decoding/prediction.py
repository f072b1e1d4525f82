"""The token of every candidate, and how sure the model is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_dllm.decoding.algorithm import StepInputs
from sglang_dllm.decoding.sampling import Stream, counter_uniform, distribution, draw
from sglang_dllm.decoding.statistics import (
    DRAW_ELEMENTS,
    PROBABILITY,
    Statistic,
    row_chunks,
)


@dataclass(frozen=True)
class Prediction:
    """``tokens``: (N,) int64. ``value``: (N,) float64, the greatest is the best.

    Not to be written to: they may be what the forward computed, kept in its graph.
    """

    tokens: torch.Tensor
    value: torch.Tensor


def predict(
    judged: StepInputs, statistic: Statistic = PROBABILITY, *, of_drawn: bool = False
) -> Prediction:
    """Predict a token for each candidate and measure it.

    The token is the argmax of the logits without the mask token, or a draw where the
    canvas has a temperature. A row with a NaN measures as minus infinity, so that a
    broken row is never accepted before a sound one and never blocks progress.

    Args:
        statistic: reads the probabilities of the row.
        of_drawn: at a temperature, read the distribution that the token is drawn
            from (Dream's samplers) instead of the plain softmax (LLaDA's).
    """
    best = plain_prediction(judged, statistic)
    tokens, value = best.tokens, best.value
    drawn = judged.only([not c.sampling.greedy for c in judged.canvases.records])
    if drawn is not None:
        tokens, value = tokens.clone(), value.clone()
        mask_id = judged.facts.mask_id
        uniform = uniforms(judged, Stream.TOKEN)[drawn]
        temperature = _sampling(judged, "temperature", torch.float64)[drawn]
        top_p = _sampling(judged, "top_p", torch.float64)[drawn]
        top_k = _sampling(judged, "top_k", torch.int64)[drawn]
        for part in row_chunks(len(drawn), judged.facts.vocab_size, DRAW_ELEMENTS):
            rows = drawn[part]
            logits = judged.logits_of(rows)
            p = distribution(
                logits, mask_id, temperature[part], top_p[part], top_k[part]
            )
            tokens[rows] = draw(p, uniform[part])
            if not of_drawn:
                p = logits.double().softmax(dim=-1)
            found = statistic.of(p, tokens[rows], mask_id)
            value[rows] = found.masked_fill(found.isnan(), -torch.inf)
    return Prediction(tokens, value)


def plain_prediction(
    judged: StepInputs, statistic: Statistic = PROBABILITY
) -> Prediction:
    """As ``predict`` at temperature 0, whatever the canvas's."""
    if not judged.num_candidates:
        nothing = torch.zeros_like(judged.positions)
        return Prediction(nothing, nothing.double())
    return Prediction(*judged.logits_of.measure(statistic, judged.facts.mask_id))


def confidence(judged: StepInputs) -> Prediction:
    """Tokens and their probabilities, by the sampler family."""
    return predict(judged, of_drawn=judged.facts.family.sampler_family == "Dream")


def uniforms(judged: StepInputs, stream: Stream) -> torch.Tensor:
    """``(N,)`` float64 in [0, 1): each candidate's own random number of this step."""
    return counter_uniform(
        _sampling(judged, "seed", torch.int64),
        judged.canvases.num_forwards[judged.canvas_index],
        judged.positions,
        stream,
    )


def _sampling(judged: StepInputs, name: str, dtype: torch.dtype) -> torch.Tensor:
    return judged.canvases.sampling(name, dtype)[judged.canvas_index]
