"""LLaDA's own sampler (arXiv 2502.09992): a fixed number of steps for each block."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

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
from sglang_dllm.decoding.options import BlockSize, Bool, Options, Steps
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import probability
from sglang_dllm.errors import OptionError
from sglang_dllm.families import Family, ModelFacts


class LLaDAOptions(Options):
    block_size: BlockSize = 32
    steps: Steps | None = None
    remasking: Annotated[
        Literal["low_confidence", "random"],
        Field(description="low_confidence or random"),
    ] = "low_confidence"
    cfg_scale: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.0
    logits_eos_inf: Bool = False
    confidence_eos_eot_inf: Bool = False


class ScheduledState(BlockwiseState):
    """A block and how many of its masks each step commits."""

    def begin_block(self) -> None:
        super().begin_block()
        num_blocks = -(-self.canvas.answer_len // self.options.block_size)
        self.num_steps = shared_out(self.options.steps, num_blocks, self.block_index)
        self.num_masks = self.end - self.start
        self.steps_done = 0

    def plan_in_block(self) -> Step:
        quota = 0
        while quota == 0:
            # More steps than masks: those that commit nothing run no forward.
            quota = shared_out(self.num_masks, self.num_steps, self.steps_done)
            self.steps_done += 1
        masks = self.canvas.masked[self.start : self.end]
        return Step(self.start + np.flatnonzero(masks), quota=quota)


class LLaDA(Algorithm):
    """The most confident masks of the block, or random ones, by a schedule."""

    options = LLaDAOptions

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        num_blocks = -(-answer_len // options.block_size)
        if options.steps is None:
            return options.model_copy(update={"steps": answer_len})
        if options.steps < num_blocks:
            raise OptionError(
                "steps",
                options.steps,
                f"at least one for each of the {num_blocks} blocks of "
                f"{options.block_size} tokens",
            )
        return options

    def is_guided(self, options: Any) -> bool:
        return bool(options.cfg_scale > 0)

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        return ScheduledState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        judged = replace(judged, logits=without_eos(judged, guided(judged)))
        found = predict(judged)
        order = found.value.clone()
        hidden = judged.only(lambda state: state.options.confidence_eos_eot_inf)
        if hidden is not None:
            order[hidden] = confidence_without_ends(judged, hidden, found.tokens)
        at_random = judged.only(lambda state: state.options.remasking == "random")
        if at_random is not None:
            order[at_random] = uniforms(judged, Stream.ORDER)[at_random]
        rank = ranks(order, judged.canvas_index, judged.num_canvases)
        return Choice(rank < judged.quota(), found.tokens)


def guided(judged: Judged) -> torch.Tensor:
    """Logits ``(N, V)`` after classifier-free guidance where a canvas asks for it."""
    rows = judged.only(lambda state: state.options.cfg_scale > 0)
    if rows is None:
        return judged.logits
    assert judged.unconditional is not None
    scale = judged.option("cfg_scale")[rows, None]
    logits, free = judged.logits.double(), judged.unconditional.double()
    logits[rows] = free + (scale + 1) * (logits[rows] - free)
    return logits


def without_eos(judged: Judged, logits: torch.Tensor) -> torch.Tensor:
    """Logits in which EOS cannot be predicted where a canvas asks for it."""
    rows = judged.only(lambda state: state.options.logits_eos_inf)
    if rows is None:
        return logits
    logits = logits.clone()
    for eos in judged.facts.eos_ids:
        logits[rows, eos] = -torch.inf
    return logits


def confidence_without_ends(
    judged: Judged, rows: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Confidence ``(K,)`` of some candidates with EOS and turn end out of the logits.

    A position that predicts one of them has confidence 0 and is committed last.
    """
    logits = judged.logits[rows].double()
    for token in (*judged.facts.eos_ids, judged.facts.turn_end_id):
        if token is not None:
            logits[:, token] = -torch.inf
    return probability(logits.softmax(dim=-1), tokens[rows])
