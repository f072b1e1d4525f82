"""Fast-dLLM v1 (arXiv 2505.22618): parallel decoding by confidence."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import block_step, whole_canvas_step
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import BlockSize, Options, Probability, StepCount
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.models.facts import Family

TOKENS_A_STEP = 32
"""Of the default ``steps`` on Dream: the block length of Fast-dLLM's evaluations."""


class FastDLLMOptions(Options):
    exclusive = ("threshold", "factor")

    threshold: Probability | None = None
    factor: (
        Annotated[float, Field(ge=0, le=1000, description="a number, 0 to 1000")] | None
    ) = None
    block_size: BlockSize = 32
    steps: StepCount | None = None


class FastDLLM(Algorithm):
    """Every candidate that is sure enough, and always the surest.

    LLaDA goes block by block. Dream takes the whole canvas: each step considers its
    share of the tokens and what the steps before left; with a cache, which needs
    something to recompute, it goes block by block too (as published).

    State on Dream: ``offers`` ``(R,)`` int64, how many steps have made an offer.
    """

    options = FastDLLMOptions
    caches = CACHES
    statistics = (PROBABILITY,)

    def defaults(self, family: Family) -> dict[str, Any]:
        return {"threshold": 0.9}

    def unused_keys(self, family: Family, cache: str) -> frozenset[str]:
        whole = family.sampler_family == "Dream" and cache == "none"
        return frozenset({"block_size" if whole else "steps"})

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        if family.sampler_family == "Dream" and options.steps is None:
            steps = -(-answer_len // TOKENS_A_STEP)
            return options.model_copy(update={"steps": steps})
        return options

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        if canvases.facts.family.sampler_family == "Dream":
            return {"offers": torch.zeros_like(canvases.answer_len)}
        return {}

    def plan(self, canvases: CanvasBatch) -> Step:
        by_block = block_step(canvases)
        if canvases.facts.family.sampler_family != "Dream":
            return by_block
        whole = whole_canvas_step(canvases)
        is_whole = canvases.option_is("cache", "none")
        return Step(
            torch.where(is_whole[:, None], whole.candidates, by_block.candidates),
            torch.where(is_whole, whole.start, by_block.start),
            torch.where(is_whole, whole.end, by_block.end),
            quota=torch.where(
                is_whole, _quota(canvases), by_block.candidates.sum(dim=1)
            ),
        )

    def choose(self, judged: StepInputs) -> Decision:
        found = confidence(judged)
        rank = ranks(found.value, judged.canvas_index, judged.num_canvases)
        # An option that is not given is one that nothing passes.
        threshold = judged.option("threshold", missing=torch.inf)
        factor = judged.option("factor", missing=torch.inf)
        by_threshold = (rank == 0) | (found.value >= threshold)
        by_factor = before_first_failure(found.value, rank, factor, judged)
        accepted = torch.where(factor.isinf(), by_threshold, by_factor)
        return Decision(accepted & (rank < judged.quota()), found.tokens)


def _quota(canvases: CanvasBatch) -> torch.Tensor:
    """``(R,)`` int64: what has been offered up to this step, less what was taken."""
    length, state = canvases.answer_len, canvases.state
    steps = canvases.option("steps", torch.int64)
    taken = length - canvases.masked.sum(dim=1)
    few, num_more = length // steps, length % steps
    # The first steps offer the most, so that each has something to offer.
    offers = torch.minimum(state["offers"] + 1, steps)
    state["offers"] = offers
    return offers * few + torch.minimum(offers, num_more) - taken


def before_first_failure(
    value: torch.Tensor, rank: torch.Tensor, factor: torch.Tensor, judged: StepInputs
) -> torch.Tensor:
    """Fast-dLLM's factor rule, as a mask ``(N,)``.

    Of the n candidates considered the one of rank i, from 1, fails below
    ``1 - factor / (i + 1)``; the first never does. A failure of the last one alone
    does not count, as in the published loop.
    """
    considered = judged.quota()
    fails = (rank > 0) & (rank < considered) & (value < 1 - factor / (rank + 2))
    first = torch.full(
        (judged.num_canvases,), len(value), dtype=torch.int64, device=value.device
    ).scatter_reduce(
        0, judged.canvas_index, torch.where(fails, rank, considered), "amin"
    )[judged.canvas_index]
    return rank < torch.where(first == considered - 1, considered, first)
