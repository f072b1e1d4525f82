"""Dream's own sampler (Dream 7B, 2025): the whole canvas by a schedule of times."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import Options, StepCount
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import MARGIN, PROBABILITY, Statistic
from sglang_dllm.decoding.step import Step
from sglang_dllm.decoding.tensor_rows import TensorRows, first_true
from sglang_dllm.models.facts import ModelFacts

MEASURES = {
    "origin": PROBABILITY,
    "maskgit_plus": PROBABILITY,
    "topk_margin": MARGIN,
    "entropy": Statistic("negative_entropy", eps=1e-10),
}
ALGS = tuple(MEASURES)

_LEAST_UNIFORM = 1e-300
"""Keeps the Gumbel noise of a random number that is 0 finite."""


class DreamOptions(Options):
    steps: StepCount | None = None
    alg: Annotated[
        Literal["origin", "maskgit_plus", "topk_margin", "entropy"],
        Field(description="origin, maskgit_plus, topk_margin or entropy"),
    ] = "entropy"
    alg_temp: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.0
    eps: Annotated[float, Field(ge=0, le=0.5, description="a number, 0 to 0.5")] = 1e-3


@dataclass
class DreamState(TensorRows):
    """
    Attributes:
        alg: ``(R,)`` int64: the option as an index of ``ALGS``.
        alg_temp: ``(R,)`` float64.
        shares: ``(R, steps)`` float32: the share of the masks that each step commits,
            on the way from time 1 to ``eps``.
        num_steps: ``(R,)`` int64: those of the row; its shares may be padded.
        next_step: ``(R,)`` int64: index of the first step that was not run.
        quota: ``(R,)`` int64: how many of the best candidates this step accepts.
        share: ``(R,)`` float64: the probability with which ``origin`` accepts each
            candidate in this step.
    """

    alg: torch.Tensor
    alg_temp: torch.Tensor
    shares: torch.Tensor
    num_steps: torch.Tensor
    next_step: torch.Tensor
    quota: torch.Tensor
    share: torch.Tensor

    def uses(self, alg: str) -> torch.Tensor:
        """``(R,)`` bool: the canvases with that value of ``alg``."""
        return self.alg == ALGS.index(alg)


Batch: TypeAlias = CanvasBatch[DreamOptions, DreamState]
Inputs: TypeAlias = StepInputs[DreamOptions, DreamState]


class Dream(Algorithm[DreamOptions, DreamState]):
    """The best masks of the canvas by one of three measures, or each by chance."""

    options = DreamOptions
    state = DreamState
    by_length = ("steps",)

    def finalize(
        self, options: DreamOptions, answer_len: int, facts: ModelFacts
    ) -> DreamOptions:
        if options.steps is None:
            return options.model_copy(update={"steps": answer_len})
        return options

    def captured_options(self, options: DreamOptions) -> DreamOptions | None:
        if options.alg_temp > 0:
            return None
        return DreamOptions(max_forwards=1, alg=options.alg)

    def begin(
        self, batch: CanvasBatch[DreamOptions, Any], options: DreamOptions
    ) -> DreamState:
        assert options.steps is not None
        # float32 as published: in float64 some schedules differ by a token.
        times = torch.linspace(1, options.eps, options.steps + 1)
        shares = 1 - times[1:] / times[:-1]
        shares[-1] = 1
        return DreamState(
            alg=batch.one_row(ALGS.index(options.alg)),
            alg_temp=batch.one_row(options.alg_temp),
            shares=shares[None].to(batch.device, non_blocking=True),
            num_steps=batch.one_row(options.steps),
            next_step=batch.one_row(0),
            quota=batch.one_row(0),
            share=batch.one_row(0.0),
        )

    def next_step(self, batch: Batch) -> Step:
        step, state = whole_canvas_step(batch), batch.state
        index = torch.arange(state.shares.shape[1], device=state.shares.device)
        # Bad words may have held masks back in the last step: the next one commits all.
        is_behind = index >= state.num_steps[:, None]
        shares = state.shares.masked_fill(is_behind, 1.0)
        num_masks = step.candidates.sum(dim=1, keepdim=True)
        quotas = (num_masks.float() * shares).long()
        # Steps that commit nothing run no forward; by chance, any may commit some.
        may = (quotas > 0) | state.uses("origin")[:, None]
        now = first_true(may & (index >= state.next_step[:, None]))
        state.next_step = now + 1
        now = now.clamp(max=shares.shape[1] - 1)[:, None]
        state.quota = quotas.gather(1, now)[:, 0]
        state.share = shares.gather(1, now)[:, 0].double()
        return step

    def decide(self, inputs: Inputs) -> Decision:
        state = inputs.state
        algs = sorted({options.alg for options in inputs.options})
        found = predict(inputs, MEASURES[algs[0]], of_drawn=True)
        tokens, value = found.tokens, found.value
        for alg in algs[1:]:
            other = predict(inputs, MEASURES[alg], of_drawn=True)
            uses = inputs.per_candidate(state.uses(alg))
            value = torch.where(uses, other.value, value)
        order = _drawn_order(inputs, value)
        rank = ranks(order, inputs.canvas_index, inputs.num_canvases)
        accepted = rank < inputs.per_candidate(state.quota)
        if "origin" in algs:
            share = inputs.per_candidate(state.share)
            lucky = uniforms(inputs, Stream.ORDER) < share
            is_origin = inputs.per_candidate(state.uses("origin"))
            accepted = torch.where(is_origin, lucky, accepted)
        return Decision(accepted, tokens)


def _drawn_order(inputs: Inputs, value: torch.Tensor) -> torch.Tensor:
    """The measure, with Gumbel noise where a canvas has an ``alg_temp``.

    The greatest sums are a draw without replacement from ``softmax(value / alg_temp)``.
    """
    some = inputs.candidates_of([options.alg_temp > 0 for options in inputs.options])
    if some is None:
        return value
    uniform = uniforms(inputs, Stream.ORDER)[some].clamp(min=_LEAST_UNIFORM)
    noise = -torch.log(-torch.log(uniform))
    order = value.clone()
    alg_temp = inputs.per_candidate(inputs.state.alg_temp)[some]
    order[some] = value[some] / alg_temp + noise
    return order
