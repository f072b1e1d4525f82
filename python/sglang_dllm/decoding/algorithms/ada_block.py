"""AdaBlock-dLLM (arXiv 2509.26432): blocks that end where a line does."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from sglang_dllm.decoding.algorithm import (
    Algorithm,
    Choice,
    DecodingState,
    Judged,
    Step,
)
from sglang_dllm.decoding.blockwise import BlockwiseState
from sglang_dllm.decoding.canvas import Canvas, IdArray
from sglang_dllm.decoding.options import BlockSize, Options, Share, TokenIds
from sglang_dllm.decoding.prediction import Prediction, confidence
from sglang_dllm.decoding.selection import best_of_group, first_best, ranks
from sglang_dllm.families import Family, ModelFacts

WINDOW = 0.25
"""Of the answer's length: how far ahead a block's end is looked for."""


class AdaBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Share = 0.9
    delimiter_threshold: Share = 0.3
    delimiter_ids: TokenIds | None = None


class AdaBlockState(BlockwiseState):
    """A block whose end its first forward decides.

    Attributes:
        is_open: the current block's end is not decided yet; its candidates reach as
            far as it may.
    """

    is_open = False

    def begin_block(self) -> None:
        super().begin_block()
        self.is_open = True

    @property
    def window_end(self) -> int:
        ahead = int(WINDOW * self.canvas.answer_len)
        return min(self.start + ahead, len(self.canvas))

    def plan_in_block(self) -> Step:
        end = max(self.end, self.window_end) if self.is_open else self.end
        masks = self.canvas.masked[self.start : end]
        return Step(self.start + np.flatnonzero(masks))

    def commit(self, positions: IdArray, token_ids: IdArray, note: int) -> None:
        if self.is_open:
            self.end, self.is_open = self.canvas.prompt_len + note, False
        super().commit(positions, token_ids, note)


class AdaBlock(Algorithm):
    """Fast-dLLM's threshold rule in blocks of adaptive size."""

    options = AdaBlockOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        return {"delimiter_threshold": 0.5} if family.lineage == "Dream" else {}

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        if options.delimiter_ids is None:
            newlines = list(facts.newline_ids)
            options = options.model_copy(update={"delimiter_ids": newlines})
        return AdaBlockState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        found = confidence(judged)
        ends = block_ends(judged, found)
        inside = judged.positions < ends[judged.canvas_index]
        value = torch.where(inside, found.value, -torch.inf)
        rank = ranks(value, judged.canvas_index, judged.num_canvases)
        sure = found.value >= judged.option("threshold")
        return Choice(inside & ((rank == 0) | sure), found.tokens, ends)


def block_ends(judged: Judged, found: Prediction) -> torch.Tensor:
    """``(B,)`` int64: where each current block ends, from the answer's start."""
    usual: list[int] = []
    window: list[int] = []
    for state in judged.states:
        assert isinstance(state, AdaBlockState)
        usual.append(state.end - state.canvas.prompt_len)
        looks = state.window_end - state.canvas.prompt_len
        window.append(looks if state.is_open else 0)
    ends = judged.per_canvas(usual, torch.int64)
    delimiters = (
        judged.positions < judged.per_canvas(window, torch.int64)[judged.canvas_index]
    )
    delimiters &= is_delimiter(judged, found.tokens)
    best = best_of_group(
        torch.where(delimiters, found.value, -torch.inf),
        judged.canvas_index,
        judged.num_canvases,
    )
    at = first_best(found.value, judged.canvas_index, delimiters, judged.num_canvases)
    behind = torch.zeros_like(ends).index_add_(
        0, judged.canvas_index, torch.where(at, judged.positions + 1, 0)
    )
    enough = judged.per_canvas(
        [state.options.delimiter_threshold for state in judged.states], torch.float64
    )
    return torch.where(best >= enough, behind, ends)


def is_delimiter(judged: Judged, tokens: torch.Tensor) -> torch.Tensor:
    """``(N,)`` bool: whether each token is one of its canvas's delimiters."""
    lists = [state.options.delimiter_ids for state in judged.states]
    most = max(map(len, lists))
    padded = [ids + [-1] * (most - len(ids)) for ids in lists]
    ids = judged.per_canvas(padded, torch.int64).view(len(lists), most)
    return (tokens[:, None] == ids[judged.canvas_index]).any(dim=1)
