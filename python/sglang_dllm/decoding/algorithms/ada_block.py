"""AdaBlock-dLLM (arXiv 2509.26432): blocks that end where a line does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import torch

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import masks_before
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import BlockSize, Options, Probability, TokenIds
from sglang_dllm.decoding.prediction import Prediction, confidence
from sglang_dllm.decoding.selection import best_of_group, first_best, ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import Family, ModelFacts

DELIMITER_WINDOW = 0.25
"""Share of the answer's length: how far ahead the end of a block is looked for."""


class AdaBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Probability = 0.9
    delimiter_threshold: Probability = 0.3
    delimiter_ids: TokenIds | None = None


@dataclass
class AdaBlockState(TensorRows):
    """
    Attributes:
        block_size: ``(R,)`` int64.
        threshold, delimiter_threshold: ``(R,)`` float64.
        delimiters: ``(R, D)`` int64: the delimiters' ids plus 1, filled up with 0.
        start, end: ``(R,)`` int64: the current block.
        is_open: ``(R,)`` bool: ``end`` is the usual one and not decided yet.
    """

    block_size: torch.Tensor
    threshold: torch.Tensor
    delimiter_threshold: torch.Tensor
    delimiters: torch.Tensor
    start: torch.Tensor
    end: torch.Tensor
    is_open: torch.Tensor


Batch: TypeAlias = CanvasBatch[AdaBlockOptions, AdaBlockState]
Inputs: TypeAlias = StepInputs[AdaBlockOptions, AdaBlockState]


class AdaBlock(Algorithm[AdaBlockOptions, AdaBlockState]):
    """Fast-dLLM's threshold rule in blocks of adaptive size.

    The first forward of a block decides where the block ends. Its candidates reach as
    far as the block may.
    """

    options = AdaBlockOptions
    state = AdaBlockState
    caches = ("none", "prefix", "dual", "vicinity")
    statistics = (PROBABILITY,)

    def defaults(self, family: Family) -> dict[str, Any]:
        is_dream = family.sampler_family == "Dream"
        return {"delimiter_threshold": 0.5} if is_dream else {}

    def finalize(
        self, options: AdaBlockOptions, answer_len: int, facts: ModelFacts
    ) -> AdaBlockOptions:
        if options.delimiter_ids is None:
            newlines = list(facts.newline_ids)
            return options.model_copy(update={"delimiter_ids": newlines})
        return options

    def captured_options(self, options: AdaBlockOptions) -> AdaBlockOptions:
        return AdaBlockOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[AdaBlockOptions, Any], options: AdaBlockOptions
    ) -> AdaBlockState:
        ids = torch.tensor([[i + 1 for i in options.delimiter_ids or ()]])
        return AdaBlockState(
            block_size=batch.one_row(options.block_size),
            threshold=batch.one_row(options.threshold),
            delimiter_threshold=batch.one_row(options.delimiter_threshold),
            delimiters=ids.long().to(batch.device, non_blocking=True),
            start=batch.one_row(0),
            end=batch.one_row(0),
            is_open=batch.one_row(False),
        )

    def next_step(self, batch: Batch) -> Step:
        state, answer_len = batch.state, batch.rows.answer_len
        first_masked = batch.first_masked()
        is_open = first_masked >= state.end
        start = torch.where(is_open, first_masked, state.start)
        usual = torch.minimum(start + state.block_size, answer_len)
        end = torch.where(is_open, usual, state.end)
        state.start, state.end, state.is_open = start, end, is_open
        reach = torch.where(is_open, torch.maximum(end, furthest_end(batch)), end)
        return Step(masks_before(batch, reach), start, reach)

    def decide(self, inputs: Inputs) -> Decision:
        found = confidence(inputs)
        ends = block_ends(inputs, found)
        inside = inputs.positions < inputs.per_candidate(ends)
        value = torch.where(inside, found.value, -torch.inf)
        rank = ranks(value, inputs.canvas_index, inputs.num_canvases)
        sure = found.value >= inputs.per_candidate(inputs.state.threshold)
        return Decision(inside & ((rank == 0) | sure), found.tokens, payload=ends)

    def on_commit(
        self, inputs: Inputs, accepted: torch.Tensor, decision: Decision
    ) -> None:
        inputs.state.end = decision.payload


def furthest_end(batch: Batch) -> torch.Tensor:
    """``(R,)`` int64: as far as a delimiter is looked for."""
    answer_len = batch.rows.answer_len
    ahead = (DELIMITER_WINDOW * answer_len).long()
    return torch.minimum(batch.state.start + ahead, answer_len)


def block_ends(inputs: Inputs, found: Prediction) -> torch.Tensor:
    """``(R,)`` int64: where each current block ends, from the answer's start."""
    state, canvas = inputs.state, inputs.canvas_index
    looked_at = torch.where(state.is_open, furthest_end(inputs.batch), 0)
    delimiters = inputs.positions < looked_at[canvas]
    delimiters &= (found.tokens[:, None] + 1 == state.delimiters[canvas]).any(dim=1)
    best = best_of_group(
        torch.where(delimiters, found.value, -torch.inf), canvas, inputs.num_canvases
    )
    at = first_best(found.value, canvas, inputs.num_canvases, delimiters)
    behind = torch.zeros_like(state.end).index_add_(
        0, canvas, torch.where(at, inputs.positions + 1, 0)
    )
    return torch.where(best >= state.delimiter_threshold, behind, state.end)
