"""AdaBlock-dLLM (arXiv 2509.26432): blocks that end where a line does."""

from __future__ import annotations

from typing import Any

import torch

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import masks_before
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import BlockSize, Options, Probability, TokenIds
from sglang_dllm.decoding.prediction import Prediction, confidence
from sglang_dllm.decoding.selection import best_of_group, first_best, ranks
from sglang_dllm.decoding.statistics import PROBABILITY
from sglang_dllm.models.facts import Family, ModelFacts

WINDOW = 0.25
"""Of the answer's length: how far ahead a block's end is looked for."""


class AdaBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Probability = 0.9
    delimiter_threshold: Probability = 0.3
    delimiter_ids: TokenIds | None = None


class AdaBlock(Algorithm):
    """Fast-dLLM's threshold rule in blocks of adaptive size.

    A block's first forward decides where it ends; its candidates reach as far as it
    may.

    State: ``start``, ``end`` ``(R,)`` int64: the current block; ``is_open`` ``(R,)``
    bool: ``end`` is the usual one and not decided yet.
    """

    options = AdaBlockOptions
    caches = ("none", "prefix", "dual", "vicinity")
    statistics = (PROBABILITY,)

    def defaults(self, family: Family) -> dict[str, Any]:
        return {"delimiter_threshold": 0.5} if family.sampler_family == "Dream" else {}

    def complete(self, options: Any, facts: ModelFacts) -> Any:
        if options.delimiter_ids is None:
            newlines = list(facts.newline_ids)
            return options.model_copy(update={"delimiter_ids": newlines})
        return options

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        nothing = torch.zeros_like(canvases.answer_len)
        return {"start": nothing, "end": nothing, "is_open": nothing.bool()}

    def plan(self, canvases: CanvasBatch) -> Step:
        state = canvases.state
        is_open = canvases.first_masked() >= state["end"]
        start = torch.where(is_open, state["end"], state["start"])
        usual = start + canvases.option("block_size", torch.int64)
        end = torch.where(
            is_open, torch.minimum(usual, canvases.answer_len), state["end"]
        )
        state.update(start=start, end=end, is_open=is_open)
        reach = torch.where(is_open, torch.maximum(end, window_end(canvases)), end)
        return Step(masks_before(canvases, reach), start, reach)

    def choose(self, judged: StepInputs) -> Decision:
        found = confidence(judged)
        ends = block_ends(judged, found)
        inside = judged.positions < ends[judged.canvas_index]
        value = torch.where(inside, found.value, -torch.inf)
        rank = ranks(value, judged.canvas_index, judged.num_canvases)
        sure = found.value >= judged.option("threshold")
        return Decision(inside & ((rank == 0) | sure), found.tokens, ends)

    def committed(
        self, judged: StepInputs, accepted: torch.Tensor, choice: Decision
    ) -> None:
        judged.canvases.state["end"] = choice.notes


def window_end(canvases: CanvasBatch) -> torch.Tensor:
    """``(R,)`` int64: as far as a delimiter is looked for."""
    ahead = (WINDOW * canvases.answer_len).long()
    return torch.minimum(canvases.state["start"] + ahead, canvases.answer_len)


def block_ends(judged: StepInputs, found: Prediction) -> torch.Tensor:
    """``(B,)`` int64: where each current block ends, from the answer's start."""
    canvases, canvas = judged.canvases, judged.canvas_index
    ends, is_open = canvases.state["end"], canvases.state["is_open"]
    looked_at = torch.where(is_open, window_end(canvases), 0)
    delimiters = judged.positions < looked_at[canvas]
    delimiters &= is_delimiter(judged, found.tokens)
    best = best_of_group(
        torch.where(delimiters, found.value, -torch.inf),
        canvas,
        judged.num_canvases,
    )
    at = first_best(found.value, canvas, judged.num_canvases, delimiters)
    behind = torch.zeros_like(ends).index_add_(
        0, canvas, torch.where(at, judged.positions + 1, 0)
    )
    enough = canvases.option("delimiter_threshold")
    return torch.where(best >= enough, behind, ends)


def is_delimiter(judged: StepInputs, tokens: torch.Tensor) -> torch.Tensor:
    """``(N,)`` bool: whether each token is one of its canvas's delimiters."""
    lists = [options.delimiter_ids for options in judged.canvases.options]
    most = max(map(len, lists))
    padded = [ids + [-1] * (most - len(ids)) for ids in lists]
    ids = judged.canvases.constant("delimiters", lambda: padded, torch.int64)
    return (tokens[:, None] == ids[judged.canvas_index]).any(dim=1)
