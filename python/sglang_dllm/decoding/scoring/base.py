"""A scored canvas: its answer is given in secret, and an algorithm reveals it.

The answer begins as masks. Each forward says how likely the given tokens are at some
of them. The tokens are committed then, or shown for one forward, as the method says.
All rows of a scored canvas are rows of an ordinary one: they share forwards with
canvases that generate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, TypeAlias

import numpy as np
import torch
from pydantic import Field

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.algorithms.llada import guided
from sglang_dllm.decoding.canvas import Canvas, SamplingOptions
from sglang_dllm.decoding.canvas_batch import CanvasBatch, OptionsT, StateT
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import Options
from sglang_dllm.decoding.scored import Scored
from sglang_dllm.decoding.statistics import DRAW_ELEMENTS, row_chunks
from sglang_dllm.decoding.tensor_rows import TensorRows
from sglang_dllm.models.facts import ModelFacts

Inputs: TypeAlias = StepInputs[Any, Any]


class ScoringOptions(Options):
    cfg_scale: Annotated[
        float, Field(ge=0, le=100, description="a number, 0 to 100")
    ] = 0.0


@dataclass
class ScoringState(TensorRows):
    """
    Attributes:
        target: ``(R, A)`` int64: the continuation.
        cfg_scale: ``(R,)`` float64.
        scores: ``(R, A)`` float64: the number of each token, as the method says. They
            are 0 until a forward gives them.
    """

    target: torch.Tensor
    cfg_scale: torch.Tensor
    scores: torch.Tensor

    def add(self, inputs: Inputs, numbers: torch.Tensor) -> None:
        """Add ``(N,)`` float64 to the scores of the candidates."""
        at = inputs.canvas_index, inputs.positions
        self.scores = self.scores.index_put(at, numbers, accumulate=True)


class Scorer(Algorithm[OptionsT, StateT]):
    """The base of the methods.

    Attributes:
        is_sum: whether the numbers of the tokens add up to a log-likelihood. Otherwise
            each one is 1 for a token that greedy decoding would find.
    """

    options = ScoringOptions
    state: ClassVar[type[TensorRows]] = ScoringState
    is_sum: ClassVar[bool] = True

    def for_length(self, options: OptionsT, num_tokens: int) -> OptionsT:
        """The options with what a continuation of that length fills in."""
        return options

    def is_guided(self, options: Any) -> bool:
        return bool(options.cfg_scale > 0)

    def begin(self, batch: CanvasBatch[OptionsT, Any], options: OptionsT) -> StateT:
        state: Any = ScoringState(**begun(batch, options))
        return state

    def scores(self, batch: CanvasBatch[OptionsT, StateT]) -> torch.Tensor:
        state: Any = batch.state
        return state.scores

    def on_commit(
        self, inputs: Inputs, accepted: torch.Tensor, decision: Decision
    ) -> None:
        """Note the numbers, the payload, of the candidates that are committed."""
        inputs.state.add(inputs, decision.payload.double().where(accepted, 0.0))


def begun(batch: CanvasBatch[Any, Any], options: Any) -> dict[str, torch.Tensor]:
    """The fields of ``ScoringState`` for one canvas."""
    (canvas,) = batch.records
    assert canvas.scored is not None, "the canvas has no continuation"
    target = torch.from_numpy(canvas.scored.target[None])
    return {
        "target": target.to(batch.device, non_blocking=True, copy=True),
        "cfg_scale": batch.one_row(float(options.cfg_scale)),
        "scores": torch.zeros(target.shape, dtype=torch.float64, device=batch.device),
    }


@dataclass(frozen=True)
class Reading:
    """A forward's distribution over the whole vocabulary, the mask token included.

    Attributes:
        target: ``(N,)`` int64: the given token of each candidate.
        logprobs: ``(N,)`` float64: of the given token, in nats.
        best: ``(N,)`` int64: the most likely token.
        confidence: ``(N,)`` float64: the probability of ``best``.
    """

    target: torch.Tensor
    logprobs: torch.Tensor
    best: torch.Tensor
    confidence: torch.Tensor


def read(inputs: Inputs) -> Reading:
    """The distributions of the candidates, after guidance. There must be a candidate.

    A row with a NaN counts as minus infinity, and nothing is sure of it.
    """
    logits = guided(inputs)
    target = inputs.state.target[inputs.canvas_index, inputs.positions]
    parts = []
    for rows in row_chunks(inputs.num_candidates, logits.vocab_size, DRAW_ELEMENTS):
        table = logits(rows).double().log_softmax(dim=-1)
        surest, best = table.max(dim=-1)
        parts.append((table.gather(1, target[rows, None])[:, 0], best, surest))
    logprobs, best, surest = map(torch.cat, zip(*parts, strict=True))
    confidence = surest.exp().nan_to_num(nan=-torch.inf)
    return Reading(target, logprobs.nan_to_num(nan=-torch.inf), best, confidence)


def scored_canvas(
    scorer: Scorer[Any, Any],
    options: ScoringOptions,
    prompt_ids: Sequence[int],
    target: Sequence[int],
    facts: ModelFacts,
    seed: int = 0,
) -> Canvas:
    """A canvas that scores ``target`` behind a prompt. It hands out no token.

    Args:
        seed: of the masks that a method draws.
    """
    return Canvas.from_prompt(
        prompt_ids,
        len(target),
        mask_id=facts.mask_id,
        eos_ids=facts.eos_ids,
        ignore_eos=True,
        sampling=SamplingOptions(seed=seed),
        num_windows=2 if scorer.is_guided(options) else 1,
        num_shown=0,
        scored=Scored(np.asarray(target, dtype=np.int64), scorer.is_sum),
    )
