"""Fast-dLLM v1 (arXiv 2505.22618): parallel decoding by confidence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import block_step, whole_canvas_step
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import BlockSize, Options, Probability, StepCount
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import Family, ModelFacts

TOKENS_A_STEP = 32
"""Gives the default ``steps`` on Dream: the block length of Fast-dLLM's evaluations."""


class FastDLLMOptions(Options):
    mutually_exclusive = ("threshold", "factor")

    threshold: Probability | None = None
    factor: (
        Annotated[float, Field(ge=0, le=1000, description="a number, 0 to 1000")] | None
    ) = None
    block_size: BlockSize = 32
    steps: StepCount | None = None


@dataclass
class FastDLLMState(TensorRows):
    """
    Attributes:
        block_size, steps: ``(R,)`` int64.
        threshold, factor: ``(R,)`` float64; infinity for the one that is not used,
            which no confidence passes.
        offers: ``(R,)`` int64, on Dream's whole canvas: how many steps made an offer.
        quota: ``(R,)`` int64, likewise: how many of the best candidates this step
            considers.
    """

    block_size: torch.Tensor
    steps: torch.Tensor
    threshold: torch.Tensor
    factor: torch.Tensor
    offers: torch.Tensor
    quota: torch.Tensor


Batch: TypeAlias = CanvasBatch[FastDLLMOptions, FastDLLMState]
Inputs: TypeAlias = StepInputs[FastDLLMOptions, FastDLLMState]


class FastDLLM(Algorithm[FastDLLMOptions, FastDLLMState]):
    """Every candidate that is sure enough, and always the surest.

    LLaDA goes block by block. Dream takes the whole canvas: each step considers its
    share of the tokens and the tokens that earlier steps left. With a cache, which
    needs a span smaller than the canvas, Dream goes block by block too (as published).
    """

    options = FastDLLMOptions
    state = FastDLLMState
    by_length = ("steps",)
    caches = ALL_CACHES
    statistics = (PROBABILITY,)

    def defaults(self, family: Family) -> dict[str, Any]:
        return {"threshold": 0.9}

    def unused_keys(self, family: Family, cache: str) -> frozenset[str]:
        is_whole = family.sampler_family == "Dream" and cache == "none"
        return frozenset({"block_size" if is_whole else "steps"})

    def finalize(
        self, options: FastDLLMOptions, answer_len: int, facts: ModelFacts
    ) -> FastDLLMOptions:
        if facts.family.sampler_family == "Dream" and options.steps is None:
            steps = -(-answer_len // TOKENS_A_STEP)
            return options.model_copy(update={"steps": steps})
        return options

    def captured_options(self, options: FastDLLMOptions) -> FastDLLMOptions:
        return FastDLLMOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[FastDLLMOptions, Any], options: FastDLLMOptions
    ) -> FastDLLMState:
        threshold, factor = options.threshold, options.factor
        return FastDLLMState(
            block_size=batch.one_row(options.block_size),
            steps=batch.one_row(options.steps or 1),
            threshold=batch.one_row(torch.inf if threshold is None else threshold),
            factor=batch.one_row(torch.inf if factor is None else factor),
            offers=batch.one_row(0),
            quota=batch.one_row(0),
        )

    def next_step(self, batch: Batch) -> Step:
        state = batch.state
        if _takes_whole_canvas(batch):
            state.quota = _offered(batch)
            return whole_canvas_step(batch)
        return block_step(batch, state.block_size)

    def decide(self, inputs: Inputs) -> Decision:
        found, state = confidence(inputs), inputs.state
        rank = ranks(found.value, inputs.canvas_index, inputs.num_canvases)
        quota = state.quota
        if not _takes_whole_canvas(inputs.batch):
            quota = inputs.step.candidates.sum(dim=1)
        quota = inputs.per_candidate(quota)
        threshold = inputs.per_candidate(state.threshold)
        factor = inputs.per_candidate(state.factor)
        by_threshold = (rank == 0) | (found.value >= threshold)
        by_factor = before_first_failure(found.value, rank, factor, quota, inputs)
        accepted = torch.where(factor.isinf(), by_threshold, by_factor)
        return Decision(accepted & (rank < quota), found.tokens)


def _takes_whole_canvas(batch: Batch) -> bool:
    """True if these canvases, which share a cache strategy, go without blocks."""
    is_dream = batch.facts.family.sampler_family == "Dream"
    return is_dream and not batch.records[0].has_cache


def _offered(batch: Batch) -> torch.Tensor:
    """``(R,)`` int64: what was offered up to this step, less what was taken."""
    state, length = batch.state, batch.rows.began_masked.sum(dim=1)
    taken = length - batch.rows.masked.sum(dim=1)
    few, num_more = length // state.steps, length % state.steps
    # The first steps offer the most, so that each has something to offer.
    state.offers = torch.minimum(state.offers + 1, state.steps)
    return state.offers * few + torch.minimum(state.offers, num_more) - taken


def before_first_failure(
    value: torch.Tensor,
    rank: torch.Tensor,
    factor: torch.Tensor,
    considered: torch.Tensor,
    inputs: Inputs,
) -> torch.Tensor:
    """Fast-dLLM's factor rule, as a mask ``(N,)``.

    n candidates are considered. The one of rank i, from 1, fails below
    ``1 - factor / (i + 1)``; the first never fails. A failure of the last one alone
    does not count, as in the published loop.

    Args:
        considered: ``(N,)`` int64: n of each candidate's canvas.
    """
    fails = (rank > 0) & (rank < considered) & (value < 1 - factor / (rank + 2))
    nothing = torch.full(
        (inputs.num_canvases,), len(value), dtype=torch.int64, device=value.device
    )
    first = inputs.per_candidate(
        nothing.scatter_reduce(
            0, inputs.canvas_index, torch.where(fails, rank, considered), "amin"
        )
    )
    return rank < torch.where(first == considered - 1, considered, first)
