"""dInfer's credit decoder (arXiv 2510.08666): trust what keeps being predicted."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Choice, DecodingState, Judged
from sglang_dllm.decoding.blockwise import BlockwiseState
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.options import Options, Share
from sglang_dllm.decoding.prediction import confidence, plain_prediction
from sglang_dllm.decoding.selection import best_of_group
from sglang_dllm.families import ModelFacts

TIE = 1e-5
"""Candidates this close to the best confidence are accepted with it, as in dInfer."""


class CreditOptions(Options):
    block_size: Annotated[
        int, Field(ge=1, le=512, description="an integer, 1 to 512")
    ] = 32
    threshold: Share = 0.9
    credit_alpha: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.7
    boost_gamma: Annotated[
        float, Field(ge=0, le=10, description="a number, 0 to 10")
    ] = 0.2
    decay_beta: Share = 0.8


class CreditState(BlockwiseState):
    """A block with the credit of what was predicted in it.

    Attributes:
        tokens, credit: ``(block + 1, S)`` int64 and float64 after S steps of the
            block: column s has the tokens that step s predicted for the first time,
            -1 where a position's token was predicted before. A table of the whole
            vocabulary would be nearly empty. The last row stands for the positions
            behind the block, candidates in a last forward only, and has no credit.
    """

    tokens: torch.Tensor
    credit: torch.Tensor

    def begin_block(self) -> None:
        super().begin_block()
        num_rows = self.end - self.start + 1
        self.tokens = torch.empty((num_rows, 0), dtype=torch.int64)
        self.credit = torch.empty((num_rows, 0), dtype=torch.float64)

    def rows(self, answer_positions: torch.Tensor) -> torch.Tensor:
        """The table's row of each position."""
        inside = answer_positions - (self.start - self.canvas.prompt_len)
        return inside.clamp(max=self.end - self.start)

    def add(
        self, rows: torch.Tensor, tokens: torch.Tensor, boost: torch.Tensor
    ) -> None:
        """Let all credit decay, then add ``boost`` to what was predicted just now."""
        known = self.tokens.to(tokens.device)
        fresh = torch.full((len(known), 1), -1, dtype=torch.int64, device=known.device)
        again = known[rows] == tokens[:, None]
        fresh[rows, 0] = torch.where(again.any(dim=1), -1, tokens)
        self.tokens = torch.cat([known, fresh], dim=1)
        decayed = self.credit.to(tokens.device) * self.options.decay_beta
        self.credit = torch.nn.functional.pad(decayed, (0, 1))
        now = self.tokens[rows] == tokens[:, None]
        self.credit[rows] += torch.where(now, boost[:, None], 0)
        self.tokens[-1], self.credit[-1] = -1, 0


class Credit(Algorithm):
    """A threshold on the confidence of logits raised by credit."""

    options = CreditOptions

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        return CreditState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        tokens, credit = _update(judged)
        raised = judged.option("credit_alpha")[:, None] * torch.log1p(credit)
        # A column without a token raises its row's first logit by nothing.
        logits = judged.logits.double().scatter_add(1, tokens.clamp(min=0), raised)
        found = confidence(replace(judged, logits=logits))
        best = best_of_group(found.value, judged.canvas_index, judged.num_canvases)
        threshold = torch.minimum(
            judged.option("threshold"), best[judged.canvas_index] - TIE
        )
        return Choice(found.value >= threshold, found.tokens)


def _update(judged: Judged) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates' credit after this forward: tokens and credit, ``(N, S)``."""
    predicted = plain_prediction(judged)
    boost = predicted.value.clamp(min=0) ** judged.option("boost_gamma")
    counts = [len(step.candidates) for step in judged.steps]
    tables: list[tuple[torch.Tensor, torch.Tensor]] = []
    for state, positions, tokens, added in zip(
        judged.states,
        judged.positions.split(counts),
        predicted.tokens.split(counts),
        boost.split(counts),
        strict=True,
    ):
        assert isinstance(state, CreditState)
        rows = state.rows(positions)
        state.add(rows, tokens, added)
        tables.append((state.tokens[rows], state.credit[rows]))
    widest = max(tokens.shape[1] for tokens, _ in tables)

    def packed(which: int, nothing: int) -> torch.Tensor:
        pad = torch.nn.functional.pad
        return torch.cat(
            [
                pad(t[which], (0, widest - t[which].shape[1]), value=nothing)
                for t in tables
            ]
        )

    return packed(0, -1), packed(1, 0)
