"""LLaDA's own sampler (arXiv 2502.09992): a fixed number of steps for each block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import (
    began_masked,
    begun_blocks,
    block_step,
    shared_out,
)
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.logits import Candidates, Logits
from sglang_dllm.decoding.options import BlockSize, Bool, Options, StepCount
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import PROBABILITY, row_chunks
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.errors import OptionError
from sglang_dllm.models.facts import ModelFacts


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


@dataclass
class LLaDAState(TensorRows):
    """
    Attributes:
        block_size, steps: ``(R,)`` int64.
        cfg_scale: ``(R,)`` float64.
        logits_eos_inf: ``(R,)`` bool.
        quota: ``(R,)`` int64: how many of the best candidates this step accepts.
    """

    block_size: torch.Tensor
    steps: torch.Tensor
    cfg_scale: torch.Tensor
    logits_eos_inf: torch.Tensor
    quota: torch.Tensor


Batch: TypeAlias = CanvasBatch[LLaDAOptions, LLaDAState]
Inputs: TypeAlias = StepInputs[LLaDAOptions, LLaDAState]


class LLaDA(Algorithm[LLaDAOptions, LLaDAState]):
    """The most confident masks of the block, or random ones, by a schedule."""

    options = LLaDAOptions
    state = LLaDAState
    by_length = ("steps",)
    caches = ALL_CACHES
    statistics = (PROBABILITY,)

    def finalize(
        self, options: LLaDAOptions, answer_len: int, facts: ModelFacts
    ) -> LLaDAOptions:
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

    def is_guided(self, options: LLaDAOptions) -> bool:
        return options.cfg_scale > 0

    def changes_logits(self, options: LLaDAOptions) -> bool:
        return self.is_guided(options) or options.logits_eos_inf

    def captured_options(self, options: LLaDAOptions) -> LLaDAOptions | None:
        reads_logits = options.confidence_eos_eot_inf or self.changes_logits(options)
        if reads_logits or options.remasking == "random":
            return None
        return LLaDAOptions(max_forwards=1)

    def begin(
        self, batch: CanvasBatch[LLaDAOptions, Any], options: LLaDAOptions
    ) -> LLaDAState:
        assert options.steps is not None
        return LLaDAState(
            block_size=batch.one_row(options.block_size),
            steps=batch.one_row(options.steps),
            cfg_scale=batch.one_row(options.cfg_scale),
            logits_eos_inf=batch.one_row(options.logits_eos_inf),
            quota=batch.one_row(0),
        )

    def next_step(self, batch: Batch) -> Step:
        state, size = batch.state, batch.state.block_size
        step = block_step(batch, size)
        num_blocks, index = begun_blocks(batch, size, step.start)
        num_steps = shared_out(state.steps, num_blocks.clamp(min=1), index)
        num_steps = num_steps.clamp(min=1)
        # Steps of a block that would commit nothing come last, and run no forward.
        num_masks = began_masked(batch, step)
        done = num_masks - step.candidates.sum(dim=1)
        few, num_more = num_masks // num_steps, num_masks % num_steps
        state.quota = few + (done < num_more * (few + 1))
        return step

    def decide(self, inputs: Inputs) -> Decision:
        inputs = replace(inputs, logits=without_eos(inputs, guided(inputs)))
        found = predict(inputs)
        order = found.value.clone()
        hidden = inputs.candidates_of(
            [options.confidence_eos_eot_inf for options in inputs.options]
        )
        if hidden is not None:
            order[hidden] = confidence_without_ends(inputs, hidden, found.tokens)
        at_random = inputs.candidates_of(
            [options.remasking == "random" for options in inputs.options]
        )
        if at_random is not None:
            order[at_random] = uniforms(inputs, Stream.ORDER)[at_random]
        rank = ranks(order, inputs.canvas_index, inputs.num_canvases)
        accepted = rank < inputs.per_candidate(inputs.state.quota)
        return Decision(accepted, found.tokens, logits=inputs.logits)


def guided(inputs: Inputs) -> Logits:
    """The logits after classifier-free guidance where a canvas asks for it."""
    uncond_logits_of = inputs.uncond_logits_of
    if uncond_logits_of is None:
        return inputs.logits
    scale = inputs.per_candidate(inputs.state.cfg_scale)

    def logits_of(some: Candidates) -> torch.Tensor:
        logits = inputs.logits.before_edits(some).double()
        uncond = uncond_logits_of(some).double()
        by = scale[some, None]
        return torch.where(by > 0, uncond + (by + 1) * (logits - uncond), logits)

    return inputs.logits.changed(logits_of)


def without_eos(inputs: Inputs, inner: Logits) -> Logits:
    """Logits in which EOS cannot be predicted where a canvas asks for it."""
    if not any(options.logits_eos_inf for options in inputs.options):
        return inner
    hidden = inputs.per_candidate(inputs.state.logits_eos_inf)

    def logits_of(some: Candidates) -> torch.Tensor:
        logits = inner.before_edits(some).clone()
        for eos in inputs.facts.eos_ids:
            logits[:, eos].masked_fill_(hidden[some], -torch.inf)
        return logits

    return inner.changed(logits_of)


def confidence_without_ends(
    inputs: Inputs, some: torch.Tensor, tokens: torch.Tensor
) -> torch.Tensor:
    """Confidence ``(K,)`` of some candidates, without EOS and end of turn.

    A position that predicts one of them has confidence 0 and is committed last.

    Args:
        some: ``(K,)`` int64 indices of candidates.
        tokens: ``(N,)`` int64: the tokens of all candidates.
    """
    facts = inputs.facts
    ends = [t for t in (*facts.eos_ids, facts.eot_token_id) if t is not None]
    found = []
    for part in row_chunks(len(some), facts.vocab_size):
        logits = inputs.logits(some[part]).double()
        for token in ends:
            logits[:, token] = -torch.inf
        p = logits.softmax(dim=-1)
        found.append(PROBABILITY.of(p, tokens[some[part]], facts.mask_id))
    return torch.cat(found)
