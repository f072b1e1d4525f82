"""The token of every candidate, and how sure the model is of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sglang_dllm.decoding.algorithm import Judged
from sglang_dllm.decoding.sampling import Stream, counter_uniform, distribution, draw
from sglang_dllm.decoding.statistics import (
    Statistic,
    probability,
    row_chunks,
    without_token,
)


@dataclass(frozen=True)
class Prediction:
    """``tokens``: (N,) int64. ``value``: (N,) float64, the greatest is the best."""

    tokens: torch.Tensor
    value: torch.Tensor


def predict(
    judged: Judged, statistic: Statistic = probability, *, of_drawn: bool = False
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
    logits, mask_id = judged.logits, judged.facts.mask_id
    best = plain_prediction(judged, statistic)
    tokens, value = best.tokens, best.value
    drawn = judged.only(lambda state: not state.canvas.sampling.greedy)
    if drawn is not None:
        uniform = uniforms(judged, Stream.TOKEN)[drawn]
        temperature = _sampling(judged, "temperature", torch.float64)[drawn]
        top_p = _sampling(judged, "top_p", torch.float64)[drawn]
        top_k = _sampling(judged, "top_k", torch.int64)[drawn]
        for part in row_chunks(len(drawn), logits.shape[1]):
            rows_drawn = drawn[part]
            chunk = logits[rows_drawn]
            p = distribution(
                chunk, mask_id, temperature[part], top_p[part], top_k[part]
            )
            tokens[rows_drawn] = draw(p, uniform[part])
            if not of_drawn:
                p = chunk.double().softmax(dim=-1)
            value[rows_drawn] = statistic(p, tokens[rows_drawn])
    return Prediction(tokens, _no_nan(value))


def plain_prediction(judged: Judged, statistic: Statistic = probability) -> Prediction:
    """As ``predict`` at temperature 0, whatever the canvas's."""
    num_rows, vocab_size = judged.logits.shape
    tokens = torch.empty(num_rows, dtype=torch.int64, device=judged.device)
    value = torch.empty(num_rows, dtype=torch.float64, device=judged.device)
    for rows in row_chunks(num_rows, vocab_size):
        chunk = judged.logits[rows]
        tokens[rows] = without_token(chunk, judged.facts.mask_id).argmax(dim=-1)
        value[rows] = statistic(chunk.double().softmax(dim=-1), tokens[rows])
    return Prediction(tokens, _no_nan(value))


def _no_nan(value: torch.Tensor) -> torch.Tensor:
    return value.masked_fill(value.isnan(), -torch.inf)


def confidence(judged: Judged) -> Prediction:
    """Tokens and their probabilities, by the model's lineage (docs/algorithms.md)."""
    return predict(judged, of_drawn=judged.facts.family.lineage == "Dream")


def uniforms(judged: Judged, stream: Stream) -> torch.Tensor:
    """``(N,)`` float64 in [0, 1): each candidate's own random number of this step."""
    forwards = [state.canvas.num_forwards for state in judged.states]
    return counter_uniform(
        _sampling(judged, "seed", torch.int64),
        judged.per_canvas(forwards, torch.int64)[judged.canvas_index],
        judged.positions,
        stream,
    )


def _sampling(judged: Judged, name: str, dtype: torch.dtype) -> torch.Tensor:
    values = [getattr(options, name) for options in judged.sampling]
    return judged.per_canvas(values, dtype)[judged.canvas_index]
