"""Dream's own sampler (Dream 7B, 2025): the whole canvas by a schedule of times."""

from __future__ import annotations

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
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.options import Options, Steps
from sglang_dllm.decoding.prediction import predict, uniforms
from sglang_dllm.decoding.sampling import Stream
from sglang_dllm.decoding.selection import ranks
from sglang_dllm.decoding.statistics import (
    Statistic,
    margin,
    negative_entropy,
    probability,
)
from sglang_dllm.families import Family, ModelFacts

ENTROPY_EPS = 1e-10
"""Inside the logarithm, as in Dream."""

_LEAST_UNIFORM = 1e-300
"""Keeps the Gumbel noise of a random number that is 0 finite."""


class DreamOptions(Options):
    steps: Steps | None = None
    alg: Annotated[
        Literal["origin", "maskgit_plus", "topk_margin", "entropy"],
        Field(description="origin, maskgit_plus, topk_margin or entropy"),
    ] = "entropy"
    alg_temp: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.0
    eps: Annotated[float, Field(ge=0, le=0.5, description="a number, 0 to 0.5")] = 1e-3


class TimeState(DecodingState):
    """Where on the way from time 1 to ``eps`` a canvas is."""

    def __init__(
        self, canvas: Canvas, algorithm: Algorithm, options: Any, facts: ModelFacts
    ) -> None:
        super().__init__(canvas, algorithm, options, facts)
        self.steps_done = 0
        # float32 as published: in float64 some schedules differ by a token.
        times = torch.linspace(1, options.eps, options.steps + 1).numpy()
        self.shares = 1 - times[1:] / times[:-1]
        self.shares[-1] = 1

    def plan_step(self) -> Step:
        masks = np.flatnonzero(self.canvas.masked)
        shares = self.shares[self.steps_done :]
        if self.options.alg == "origin":
            self.steps_done += 1
            return Step(masks, share=float(shares[0]))
        quotas = (len(masks) * shares).astype(np.int64)
        # Steps that commit nothing run no forward.
        skipped = int(np.argmax(quotas > 0))
        self.steps_done += skipped + 1
        return Step(masks, quota=int(quotas[skipped]))


class Dream(Algorithm):
    """The best masks of the canvas by one of three measures, or each by chance."""

    options = DreamOptions

    def settle(self, options: Any, answer_len: int, family: Family) -> Any:
        if options.steps is None:
            return options.model_copy(update={"steps": answer_len})
        return options

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        return TimeState(canvas, self, options, facts)

    def choose(self, judged: Judged) -> Choice:
        measures: dict[str, Statistic] = {
            "maskgit_plus": probability,
            "topk_margin": margin(judged.facts.mask_id),
            "entropy": negative_entropy(ENTROPY_EPS),
        }
        names = sorted({state.options.alg for state in judged.states})
        found = predict(judged, measures.get(names[0], probability), of_drawn=True)
        tokens, value = found.tokens, found.value
        for name in names[1:]:
            other = predict(judged, measures.get(name, probability), of_drawn=True)
            uses = judged.option_is("alg", name)
            value = torch.where(uses, other.value, value)
        order = self._drawn_order(judged, value)
        rank = ranks(order, judged.canvas_index, judged.num_canvases)
        accepted = rank < judged.quota()
        if "origin" in names:
            share = judged.per_canvas(
                [step.share for step in judged.steps], torch.float64
            )[judged.canvas_index]
            lucky = uniforms(judged, Stream.ORDER) < share
            accepted = torch.where(judged.option_is("alg", "origin"), lucky, accepted)
        return Choice(accepted, tokens)

    def _drawn_order(self, judged: Judged, value: torch.Tensor) -> torch.Tensor:
        """The measure, with Gumbel noise where a canvas has an ``alg_temp``.

        The greatest sums are a draw without replacement from
        ``softmax(value / alg_temp)``.
        """
        rows = judged.only(lambda state: state.options.alg_temp > 0)
        if rows is None:
            return value
        uniform = uniforms(judged, Stream.ORDER)[rows].clamp(min=_LEAST_UNIFORM)
        order = value.clone()
        order[rows] = value[rows] / judged.option("alg_temp")[rows] - torch.log(
            -torch.log(uniform)
        )
        return order
