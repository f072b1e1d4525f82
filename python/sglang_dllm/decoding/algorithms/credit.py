"""dInfer's credit decoder (arXiv 2510.08666): trust what keeps being predicted."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import block_step
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.logits import Candidates
from sglang_dllm.decoding.options import Options, Probability
from sglang_dllm.decoding.prediction import confidence, plain_prediction
from sglang_dllm.decoding.selection import best_of_group
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows

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


@dataclass
class CreditState(TensorRows):
    """R canvases of blocks of up to B tokens.

    A step commits at least one token, so a block has no more steps than tokens. A table
    of the whole vocabulary would be nearly empty.

    Attributes:
        block_size: ``(R,)`` int64.
        threshold, credit_alpha, boost_gamma, decay_beta: ``(R,)`` float64.
        start, num_steps: ``(R,)`` int64: start of the current block, and its steps.
        tokens: ``(R, B, B)`` int64: column s has the tokens that step s of the block
            predicted for the first time at each position, plus 1. 0 where the token of
            a position was predicted before.
        credit: ``(R, B, B)`` float64: the credit of those tokens.
    """

    block_size: torch.Tensor
    threshold: torch.Tensor
    credit_alpha: torch.Tensor
    boost_gamma: torch.Tensor
    decay_beta: torch.Tensor
    start: torch.Tensor
    num_steps: torch.Tensor
    tokens: torch.Tensor
    credit: torch.Tensor


Batch: TypeAlias = CanvasBatch[CreditOptions, CreditState]
Inputs: TypeAlias = StepInputs[CreditOptions, CreditState]


class Credit(Algorithm[CreditOptions, CreditState]):
    """A threshold on the confidence of logits raised by credit."""

    options = CreditOptions
    state = CreditState
    caches = ALL_CACHES
    statistics = (PROBABILITY,)

    def captured_options(self, options: CreditOptions) -> CreditOptions:
        return CreditOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[CreditOptions, Any], options: CreditOptions
    ) -> CreditState:
        shape, device = (1, options.block_size, options.block_size), batch.device
        return CreditState(
            block_size=batch.one_row(options.block_size),
            threshold=batch.one_row(options.threshold),
            credit_alpha=batch.one_row(options.credit_alpha),
            boost_gamma=batch.one_row(options.boost_gamma),
            decay_beta=batch.one_row(options.decay_beta),
            start=batch.one_row(-1),
            num_steps=batch.one_row(0),
            tokens=torch.zeros(shape, dtype=torch.int64, device=device),
            credit=torch.zeros(shape, dtype=torch.float64, device=device),
        )

    def next_step(self, batch: Batch) -> Step:
        state = batch.state
        step = block_step(batch, state.block_size)
        is_new = step.start != state.start
        state.start = step.start
        state.num_steps = torch.where(is_new, 0, state.num_steps)
        state.tokens = torch.where(is_new[:, None, None], 0, state.tokens)
        state.credit = torch.where(is_new[:, None, None], 0.0, state.credit)
        return step

    def decide(self, inputs: Inputs) -> Decision:
        tokens, credit = _update(inputs)
        alpha = inputs.per_candidate(inputs.state.credit_alpha)
        raised = alpha[:, None] * torch.log1p(credit)
        tokens = (tokens - 1).clamp(min=0)

        def logits_of(some: Candidates) -> torch.Tensor:
            # A column without a token raises the row's first logit by nothing.
            logits = inputs.logits.before_edits(some).double()
            return logits.scatter_add(1, tokens[some], raised[some])

        found = confidence(replace(inputs, logits=inputs.logits.changed(logits_of)))
        best = best_of_group(found.value, inputs.canvas_index, inputs.num_canvases)
        threshold = torch.minimum(
            inputs.per_candidate(inputs.state.threshold),
            inputs.per_candidate(best) - TIE,
        )
        return Decision(found.value >= threshold, found.tokens)


def _update(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates' credit after this forward: tokens and credit, ``(N, B)``."""
    state, canvas = inputs.state, inputs.canvas_index
    predicted = plain_prediction(inputs)
    boost = predicted.value.clamp(min=0) ** inputs.per_candidate(state.boost_gamma)
    place = inputs.positions - inputs.per_candidate(state.start)
    # Only a last forward has candidates behind the block. They get no credit.
    size = state.tokens.shape[1]
    inside = place < inputs.per_candidate(state.block_size)
    place = place.clamp(max=size - 1)
    now = predicted.tokens[:, None] + 1
    known = state.tokens[canvas, place].masked_fill(~inside[:, None], 0)
    again = (known == now).any(dim=1)
    column = torch.arange(size, device=inputs.device)
    is_now = column == state.num_steps[canvas, None]
    fresh = inside & ~again
    known = torch.where(is_now & fresh[:, None], now, known)
    decayed = state.credit * state.decay_beta[:, None, None]
    credit = decayed[canvas, place].masked_fill(~inside[:, None], 0.0)
    credit = credit + torch.where(known == now, boost[:, None], 0)
    cell = torch.where(inside, canvas * size + place, state.tokens[..., 0].numel())
    state.tokens = _written(state.tokens, cell, known)
    state.credit = _written(decayed, cell, credit)
    state.num_steps = state.num_steps + 1
    return known, credit


def _written(
    table: torch.Tensor, cell: torch.Tensor, values: torch.Tensor
) -> torch.Tensor:
    """``(R, B, B)`` with ``(N, B)`` at cells ``(N,)``; those at R*B are dropped."""
    flat = torch.nn.functional.pad(table.flatten(0, 1), (0, 0, 0, 1))
    flat[cell] = values
    return flat[:-1].view_as(table)
