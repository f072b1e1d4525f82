"""Methods that commit one token of the continuation in each forward."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision
from sglang_dllm.decoding.scoring.base import (
    Inputs,
    Scorer,
    ScoringOptions,
    ScoringState,
    begun,
    read,
)
from sglang_dllm.decoding.selection import first_best
from sglang_dllm.decoding.step import Step

Batch: TypeAlias = CanvasBatch[ScoringOptions, ScoringState]


class Chain(Scorer[ScoringOptions, ScoringState]):
    """Left to right, each token with all later ones masked (Dream's ``ar_ftb``)."""

    def next_step(self, batch: Batch) -> Step:
        first = batch.first_masked()
        candidates = batch.positions == first[:, None]
        return Step(candidates, first, first + 1)

    def decide(self, inputs: Inputs) -> Decision:
        found = read(inputs)
        accepted = torch.ones_like(found.target, dtype=torch.bool)
        return Decision(accepted, found.target, found.logprobs)


class Confidence(Scorer[ScoringOptions, ScoringState]):
    """The given token is revealed first where the model is surest (iLLaDA)."""

    def next_step(self, batch: Batch) -> Step:
        return whole_canvas_step(batch)

    def decide(self, inputs: Inputs) -> Decision:
        found = read(inputs)
        num = inputs.num_canvases
        accepted = first_best(found.confidence, inputs.canvas_index, num)
        return Decision(accepted, found.target, found.logprobs)


@dataclass
class GreedyState(ScoringState):
    """
    Attributes:
        missed: ``(R,)`` bool: a revealed token is not the given one.
    """

    missed: torch.Tensor


class Greedy(Scorer[ScoringOptions, GreedyState]):
    """Finds out whether greedy decoding gives the continuation (LLaDA's suffix rule).

    The most likely token is committed where the model is surest, one in each forward.
    A canvas ends with its first wrong token: the answer is known then.
    """

    state = GreedyState
    is_sum = False

    def begin(
        self, batch: CanvasBatch[ScoringOptions, Any], options: ScoringOptions
    ) -> GreedyState:
        return GreedyState(**begun(batch, options), missed=batch.one_row(False))

    def next_step(self, batch: CanvasBatch[ScoringOptions, GreedyState]) -> Step:
        batch.fill(batch.rows.masked & batch.state.missed[:, None], batch.state.target)
        return whole_canvas_step(batch)

    def decide(self, inputs: Inputs) -> Decision:
        found = read(inputs)
        num = inputs.num_canvases
        surest = first_best(found.confidence, inputs.canvas_index, num)
        is_right = found.best == found.target
        return Decision(surest & is_right, found.target, surest & is_right)

    def on_commit(
        self, inputs: Inputs, accepted: torch.Tensor, decision: Decision
    ) -> None:
        super().on_commit(inputs, accepted, decision)
        state = inputs.state
        found = torch.zeros_like(state.missed, dtype=torch.int64)
        found.index_add_(0, inputs.canvas_index, accepted.long())
        state.missed = state.missed | (found == 0)
