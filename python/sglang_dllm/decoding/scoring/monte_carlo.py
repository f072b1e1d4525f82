"""LLaDA's Monte Carlo estimate of a log-likelihood (``get_log_likelihood``).

A sample masks some tokens of the continuation, all of them equally likely, and costs
one forward. Sample s of a group of b samples masks ``x_s`` of L tokens: with k drawn
from 1 to L, ``x_s = 1 + (round(k + s L / b) - 1) mod L``, so that the samples of a
group are spread evenly over all numbers of masks. The estimate is the mean over all
samples of ``sum(log p of the masked tokens) / (x_s / L)``.

The random numbers are those of ``sampling.counter_uniform``, by the request's seed:
``k = 1 + floor(u L)`` with the number (seed, index of the group, 0, ``Stream.COUNT``),
and a sample masks the ``x_s`` positions with the smallest numbers (seed, index of the
sample, position, ``Stream.MASK``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, TypeAlias

import torch
from pydantic import Field

from sglang_dllm.decoding.block_steps import whole_canvas_step
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision
from sglang_dllm.decoding.sampling import Stream, counter_uniform
from sglang_dllm.decoding.scoring.base import (
    Inputs,
    Scorer,
    ScoringOptions,
    ScoringState,
    begun,
    read,
)
from sglang_dllm.decoding.step import Step

MAX_SAMPLES = 1024
_DEFAULT_SAMPLES = 128

SampleCount = Annotated[
    int,
    Field(ge=1, le=MAX_SAMPLES, description=f"an integer, 1 to {MAX_SAMPLES}"),
]


class MonteCarloOptions(ScoringOptions):
    """
    Attributes:
        num_samples: None: 128, and 1 for a continuation of one token, whose samples
            are all the same.
        batch_size: samples of a group. The last group may have fewer.
    """

    num_samples: SampleCount | None = None
    batch_size: SampleCount = 16


@dataclass
class MonteCarloState(ScoringState):
    """
    Attributes:
        num_masks: ``(R, S)`` int64: of each sample.
        num_samples: ``(R,)`` int64.
        sample: ``(R,)`` int64: index of the sample that the next forward reads.
    """

    num_masks: torch.Tensor
    num_samples: torch.Tensor
    sample: torch.Tensor


Batch: TypeAlias = CanvasBatch[MonteCarloOptions, MonteCarloState]


class MonteCarlo(Scorer[MonteCarloOptions, MonteCarloState]):
    """A new pattern of masks in each forward. It commits nothing."""

    options = MonteCarloOptions
    state = MonteCarloState

    def for_length(
        self, options: MonteCarloOptions, num_tokens: int
    ) -> MonteCarloOptions:
        if options.num_samples is not None:
            return options
        num = 1 if num_tokens == 1 else _DEFAULT_SAMPLES
        return options.model_copy(update={"num_samples": num})

    def begin(
        self, batch: CanvasBatch[MonteCarloOptions, Any], options: MonteCarloOptions
    ) -> MonteCarloState:
        (canvas,) = batch.records
        options = self.for_length(options, canvas.answer_len)
        assert options.num_samples is not None
        num_masks = mask_counts(
            canvas.answer_len,
            options.num_samples,
            options.batch_size,
            canvas.sampling.seed,
        )
        return MonteCarloState(
            **begun(batch, options),
            num_masks=num_masks[None].to(batch.device, non_blocking=True),
            num_samples=batch.one_row(options.num_samples),
            sample=batch.one_row(0),
        )

    def next_step(self, batch: Batch) -> Step:
        """Mask the positions of the next sample, none after the last one."""
        state = batch.state
        index = state.sample.clamp(max=state.num_masks.shape[1] - 1)[:, None]
        num_masks = state.num_masks.gather(1, index)
        is_over = state.sample >= state.num_samples
        number = counter_uniform(
            batch.sampling.seed[:, None],
            state.sample[:, None],
            batch.positions,
            Stream.MASK,
        ).masked_fill(~batch.inside, torch.inf)
        rank = number.argsort(dim=1, stable=True).argsort(dim=1)
        batch.show(rank < num_masks.masked_fill(is_over[:, None], 0), state.target)
        return whole_canvas_step(batch)

    def decide(self, inputs: Inputs) -> Decision:
        found = read(inputs)
        nothing = torch.zeros_like(found.target, dtype=torch.bool)
        return Decision(nothing, found.target, found.logprobs)

    def on_commit(
        self, inputs: Inputs, accepted: torch.Tensor, decision: Decision
    ) -> None:
        """Add the sample's share of the mean."""
        state, of_canvas = inputs.state, inputs.canvas_index
        num_masks = state.num_masks.gather(
            1, state.sample.clamp(max=state.num_masks.shape[1] - 1)[:, None]
        )[:, 0]
        p_mask = num_masks.double() / inputs.batch.rows.answer_len
        share = decision.payload / (p_mask * state.num_samples)[of_canvas]
        state.add(inputs, share)
        state.sample = state.sample + 1


def mask_counts(
    num_tokens: int, num_samples: int, batch_size: int, seed: int
) -> torch.Tensor:
    """``(S,)`` int64: how many of ``num_tokens`` tokens each sample masks."""
    found = []
    for group, first in enumerate(range(0, num_samples, batch_size)):
        size = min(batch_size, num_samples - first)
        of_seed, of_group, zero = torch.tensor([[seed], [group], [0]])
        number = counter_uniform(of_seed, of_group, zero, Stream.COUNT)
        k = 1 + int(number * num_tokens)
        # float32 as published: in float64 some counts differ by one.
        last = k + (size - 1) * (num_tokens / size)
        spread = torch.linspace(float(k), last, steps=size).round().long()
        found.append((spread - 1) % num_tokens + 1)
    return torch.cat(found)
