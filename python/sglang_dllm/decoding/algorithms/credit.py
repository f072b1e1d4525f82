"""dInfer's credit decoder (arXiv 2510.08666): trust what keeps being predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.logits import Rows
from sglang_dllm.decoding.options import Options, Probability
from sglang_dllm.decoding.prediction import confidence, plain_prediction
from sglang_dllm.decoding.selection import best_of_group
from sglang_dllm.decoding.statistics import PROBABILITY

TIE = 1e-5
"""Candidates this close to the best confidence are accepted with it, as in dInfer."""


class CreditOptions(Options):
    block_size: Annotated[
        int, Field(ge=1, le=512, description="an integer, 1 to 512")
    ] = 32
    threshold: Probability = 0.9
    credit_alpha: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.7
    boost_gamma: Annotated[
        float, Field(ge=0, le=10, description="a number, 0 to 10")
    ] = 0.2
    decay_beta: Probability = 0.8


class Credit(Algorithm):
    """A threshold on the confidence of logits raised by credit.

    State, for R canvases of blocks of up to B tokens: ``start`` ``(R,)``, the current
    block's, and ``num_steps`` ``(R,)``, its steps so far; ``tokens`` and ``credit``
    ``(R, B, B)`` int64 and float64, of which column s has the tokens that step s of
    the block predicted for the first time at each position, plus 1; 0 where a
    position's token was predicted before. A step commits at least one token, so that a
    block has no more steps than tokens; a table of the whole vocabulary would be nearly
    empty.
    """

    options = CreditOptions
    caches = CACHES
    statistics = (PROBABILITY,)

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        size = max(options.block_size for options in canvases.options)
        shape, device = (len(canvases), size, size), canvases.device
        return {
            "start": torch.full_like(canvases.answer_len, -1),
            "num_steps": torch.zeros_like(canvases.answer_len),
            "tokens": torch.zeros(shape, dtype=torch.int64, device=device),
            "credit": torch.zeros(shape, dtype=torch.float64, device=device),
        }

    def plan(self, canvases: CanvasBatch) -> Step:
        step, state = block_step(canvases), canvases.state
        is_new = step.start != state["start"]
        state["start"] = step.start
        state["num_steps"] = torch.where(is_new, 0, state["num_steps"])
        state["tokens"] = torch.where(is_new[:, None, None], 0, state["tokens"])
        state["credit"] = torch.where(is_new[:, None, None], 0.0, state["credit"])
        return step

    def choose(self, judged: StepInputs) -> Decision:
        tokens, credit = _update(judged)
        raised = judged.option("credit_alpha")[:, None] * torch.log1p(credit)
        tokens = (tokens - 1).clamp(min=0)

        def logits_of(rows: Rows) -> torch.Tensor:
            # A column without a token raises its row's first logit by nothing.
            logits = judged.logits_of(rows).double()
            return logits.scatter_add(1, tokens[rows], raised[rows])

        raised_logits = judged.logits_of.changed(logits_of)
        found = confidence(replace(judged, logits_of=raised_logits))
        best = best_of_group(found.value, judged.canvas_index, judged.num_canvases)
        threshold = torch.minimum(
            judged.option("threshold"), best[judged.canvas_index] - TIE
        )
        return Decision(found.value >= threshold, found.tokens)


def _update(judged: StepInputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates' credit after this forward: tokens and credit, ``(N, B)``."""
    state, canvas = judged.canvases.state, judged.canvas_index
    predicted = plain_prediction(judged)
    boost = predicted.value.clamp(min=0) ** judged.option("boost_gamma")
    place = judged.positions - state["start"][canvas]
    # Behind the block, candidates in a last forward only, nothing is credited.
    size = state["tokens"].shape[1]
    inside = place < judged.option("block_size", torch.int64)
    place = place.clamp(max=size - 1)
    now = predicted.tokens[:, None] + 1
    known = state["tokens"][canvas, place].masked_fill(~inside[:, None], 0)
    again = (known == now).any(dim=1)
    column = torch.arange(size, device=judged.device)
    is_now = column == state["num_steps"][canvas, None]
    fresh = inside & ~again
    known = torch.where(is_now & fresh[:, None], now, known)
    decay = judged.canvases.option("decay_beta")[:, None, None]
    decayed = state["credit"] * decay
    credit = decayed[canvas, place].masked_fill(~inside[:, None], 0.0)
    credit = credit + torch.where(known == now, boost[:, None], 0)
    cell = torch.where(inside, canvas * size + place, state["tokens"][..., 0].numel())
    state["tokens"] = _written(state["tokens"], cell, known)
    state["credit"] = _written(decayed, cell, credit)
    state["num_steps"] = state["num_steps"] + 1
    return known, credit


def _written(
    table: torch.Tensor, cell: torch.Tensor, rows: torch.Tensor
) -> torch.Tensor:
    """``(R, B, B)`` with ``(N, B)`` at cells ``(N,)``; those at R*B are dropped."""
    flat = torch.nn.functional.pad(table.flatten(0, 1), (0, 0, 0, 1))
    flat[cell] = rows
    return flat[:-1].view_as(table)
