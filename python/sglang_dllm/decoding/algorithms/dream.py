"""Dream's own sampler (Dream 7B, 2025): the whole canvas by a schedule of times."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step, first_true
from sglang_dllm.decoding.options import Options, StepCount
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import MARGIN, PROBABILITY, Statistic
from sglang_dllm.models.facts import Family

MEASURES = {
    "origin": PROBABILITY,
    "maskgit_plus": PROBABILITY,
    "topk_margin": MARGIN,
    "entropy": Statistic("negative_entropy", eps=1e-10),
}

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


class Dream(Algorithm):
    """The best masks of the canvas by one of three measures, or each by chance.

    State: ``shares`` ``(R, steps)`` float32, the part of the masks that each step on
    the way from time 1 to ``eps`` commits; ``next_step`` ``(R,)`` int64.
    """

    options = DreamOptions

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        if options.steps is None:
            return options.model_copy(update={"steps": answer_len})
        return options

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        (options,) = canvases.options
        # float32 as published: in float64 some schedules differ by a token.
        times = torch.linspace(1, options.eps, options.steps + 1)
        shares = 1 - times[1:] / times[:-1]
        shares[-1] = 1
        return {
            "shares": shares[None].to(canvases.device, non_blocking=True),
            "next_step": torch.zeros_like(canvases.answer_len),
        }

    def plan(self, canvases: CanvasBatch) -> Step:
        step, state = whole_canvas_step(canvases), canvases.state
        shares, next_step = state["shares"], state["next_step"][:, None]
        index = torch.arange(shares.shape[1], device=shares.device)
        num_masks = step.candidates.sum(dim=1, keepdim=True)
        quotas = (num_masks.float() * shares).long()
        # Steps that commit nothing run no forward; by chance, any may commit some.
        may = (quotas > 0) | canvases.option_is("alg", "origin")[:, None]
        now = first_true(may & (index >= next_step))
        state["next_step"] = now + 1
        now = now.clamp(max=shares.shape[1] - 1)[:, None]
        return replace(
            step,
            quota=quotas.gather(1, now)[:, 0],
            share=shares.gather(1, now)[:, 0].double(),
        )

    def choose(self, judged: StepInputs) -> Decision:
        algs = [options.alg for options in judged.canvases.options]
        names = sorted(set(algs))
        found = predict(judged, MEASURES[names[0]], of_drawn=True)
        tokens, value = found.tokens, found.value
        for name in names[1:]:
            other = predict(judged, MEASURES[name], of_drawn=True)
            value = torch.where(judged.option_is("alg", name), other.value, value)
        order = _drawn_order(judged, value)
        rank = ranks(order, judged.canvas_index, judged.num_canvases)
        accepted = rank < judged.quota()
        if "origin" in names:
            assert judged.step.share is not None
            share = judged.step.share[judged.canvas_index]
            lucky = uniforms(judged, Stream.ORDER) < share
            accepted = torch.where(judged.option_is("alg", "origin"), lucky, accepted)
        return Decision(accepted, tokens)


def _drawn_order(judged: StepInputs, value: torch.Tensor) -> torch.Tensor:
    """The measure, with Gumbel noise where a canvas has an ``alg_temp``.

    The greatest sums are a draw without replacement from ``softmax(value / alg_temp)``.
    """
    rows = judged.only([options.alg_temp > 0 for options in judged.canvases.options])
    if rows is None:
        return value
    uniform = uniforms(judged, Stream.ORDER)[rows].clamp(min=_LEAST_UNIFORM)
    order = value.clone()
    noise = -torch.log(-torch.log(uniform))
    order[rows] = value[rows] / judged.option("alg_temp")[rows] + noise
    return order
