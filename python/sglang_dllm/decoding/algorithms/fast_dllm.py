"""Fast-dLLM v1 (arXiv 2505.22618): parallel decoding by confidence, without caches."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import numpy as np
import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import (
    Algorithm,
    Choice,
    DecodingState,
    Judged,
    Step,
)
from sglang_dllm.decoding.blockwise import BlockwiseState, shared_out
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.options import BlockSize, Options, Share, Steps
from sglang_dllm.decoding.prediction import confidence
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.families import Family, ModelFacts

TOKENS_A_STEP = 32
"""Of the default ``steps`` on Dream: the block length of Fast-dLLM's evaluations."""


class FastDLLMOptions(Options):
    exclusive: ClassVar[tuple[str, ...]] = ("threshold", "factor")

    threshold: Share | None = None
    factor: (
        Annotated[float, Field(ge=0, le=1000, description="a number, 0 to 1000")] | None
    ) = None
    block_size: BlockSize = 32
    steps: Steps | None = None


class QuotaState(DecodingState):
    """Dream's whole canvas: each step considers its share and what was left."""

    def __init__(
        self, canvas: Canvas, algorithm: Algorithm, options: Any, facts: ModelFacts
    ) -> None:
        super().__init__(canvas, algorithm, options, facts)
        self.num_steps = self.num_offered = 0

    def plan_step(self) -> Step:
        masks = np.flatnonzero(self.canvas.masked)
        length = self.canvas.answer_len
        while True:
            if self.num_steps < self.options.steps:
                self.num_offered += shared_out(
                    length, self.options.steps, self.num_steps
                )
                self.num_steps += 1
            quota = self.num_offered - (length - len(masks))
            if quota > 0:
                return Step(masks, quota=quota)


class FastDLLM(Algorithm):
    """Every candidate that is sure enough, and always the surest."""

    options = FastDLLMOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        return {"threshold": 0.9}

    def unused_keys(self, family: Family) -> frozenset[str]:
        return frozenset({"block_size" if family.lineage == "Dream" else "steps"})

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        if family.lineage == "Dream" and options.steps is None:
            steps = -(-answer_len // TOKENS_A_STEP)
            return options.model_copy(update={"steps": steps})
        return options

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        state = QuotaState if facts.family.lineage == "Dream" else BlockwiseState
        return state(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        found = confidence(judged)
        rank = ranks(found.value, judged.canvas_index, judged.num_canvases)
        # An option that is not given is one that nothing passes.
        threshold = judged.option("threshold", missing=torch.inf)
        factor = judged.option("factor", missing=torch.inf)
        by_threshold = (rank == 0) | (found.value >= threshold)
        by_factor = before_first_failure(found.value, rank, factor, judged)
        accepted = torch.where(factor.isinf(), by_threshold, by_factor)
        return Choice(accepted & (rank < judged.quota()), found.tokens)


def before_first_failure(
    value: torch.Tensor, rank: torch.Tensor, factor: torch.Tensor, judged: Judged
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
