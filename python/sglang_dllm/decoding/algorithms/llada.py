"""LLaDA's own sampler (arXiv 2502.09992): a fixed number of steps for each block."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import block_step, shared_out
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.logits import Logits, Rows
from sglang_dllm.decoding.options import BlockSize, Bool, Options, StepCount
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY, row_chunks
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import Family


class LLaDAOptions(Options):
    block_size: BlockSize = 32
    steps: StepCount | None = None
    remasking: Annotated[
        Literal["low_confidence", "random"],
        Field(description="low_confidence or random"),
    ] = "low_confidence"
    cfg_scale: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.0
    logits_eos_inf: Bool = False
    confidence_eos_eot_inf: Bool = False


class LLaDA(Algorithm):
    """The most confident masks of the block, or random ones, by a schedule."""

    options = LLaDAOptions
    caches = CACHES
    statistics = (PROBABILITY,)

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

    def plan(self, canvases: CanvasBatch) -> Step:
        step = block_step(canvases)
        size = canvases.option("block_size", torch.int64)
        num_blocks = -(-canvases.answer_len // size)
        steps = canvases.option("steps", torch.int64)
        num_steps = shared_out(steps, num_blocks, step.start // size).clamp(min=1)
        # Steps of a block that would commit nothing come last, and run no forward.
        num_masks = step.end - step.start
        done = num_masks - step.candidates.sum(dim=1)
        few, num_more = num_masks // num_steps, num_masks % num_steps
        return replace(step, quota=few + (done < num_more * (few + 1)))

    def choose(self, judged: StepInputs) -> Decision:
        judged = replace(judged, logits_of=without_eos(judged, guided(judged)))
        found = predict(judged)
        order = found.value.clone()
        options = judged.canvases.options
        hidden = judged.only([o.confidence_eos_eot_inf for o in options])
        if hidden is not None:
            order[hidden] = confidence_without_ends(judged, hidden, found.tokens)
        at_random = judged.only([o.remasking == "random" for o in options])
        if at_random is not None:
            order[at_random] = uniforms(judged, Stream.ORDER)[at_random]
        rank = ranks(order, judged.canvas_index, judged.num_canvases)
        return Decision(rank < judged.quota(), found.tokens)


def guided(judged: StepInputs) -> Logits:
    """The logits after classifier-free guidance where a canvas asks for it."""
    free_of = judged.uncond_logits_of
    if free_of is None:
        return judged.logits_of
    scale = judged.option("cfg_scale")

    def logits_of(rows: Rows) -> torch.Tensor:
        logits = judged.logits_of(rows).double()
        free = free_of(rows).double()
        by = scale[rows, None]
        return torch.where(by > 0, free + (by + 1) * (logits - free), logits)

    return judged.logits_of.changed(logits_of)


def without_eos(judged: StepInputs, inner: Logits) -> Logits:
    """Logits in which EOS cannot be predicted where a canvas asks for it."""
    if not any(options.logits_eos_inf for options in judged.canvases.options):
        return inner
    hidden = judged.option_is("logits_eos_inf", True)

    def logits_of(rows: Rows) -> torch.Tensor:
        logits = inner(rows).clone()
        for eos in judged.facts.eos_ids:
            logits[:, eos].masked_fill_(hidden[rows], -torch.inf)
        return logits

    return inner.changed(logits_of)


def confidence_without_ends(
    judged: StepInputs, rows: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Confidence ``(K,)`` of some candidates with EOS and turn end out of the logits.

    A position that predicts one of them has confidence 0 and is committed last.
    """
    ends = [
        t for t in (*judged.facts.eos_ids, judged.facts.eot_token_id) if t is not None
    ]
    found = []
    for part in row_chunks(len(rows), judged.facts.vocab_size):
        logits = judged.logits_of(rows[part]).double()
        for token in ends:
            logits[:, token] = -torch.inf
        p = logits.softmax(dim=-1)
        found.append(PROBABILITY.of(p, tokens[rows[part]], judged.facts.mask_id))
    return torch.cat(found)
