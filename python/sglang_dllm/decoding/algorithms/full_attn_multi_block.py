"""d3LLM's multi-block decoding by entropy (arXiv 2601.07568).

Sources: ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
"""

from __future__ import annotations

from typing import Any, TypeVar

import torch

from sglang_dllm.decoding.algorithm import Algorithm
from sglang_dllm.decoding.block_pipeline import (
    PipelineState,
    begin_pipeline,
    next_pipeline_step,
    note_committed,
)
from sglang_dllm.decoding.caches.registry import ALL_CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.decision import Decision, StepInputs
from sglang_dllm.decoding.options import BlockSize, Bool, Nats, Options, Probability
from sglang_dllm.decoding.prediction import predict
from sglang_dllm.decoding.selection import count, first_best
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.decoding.step import Step
from sglang_dllm.models.facts import Family

NEGATIVE_ENTROPY = Statistic("negative_entropy", eps=1e-12)
"""As in d3LLM; thresholds are nats over the full vocabulary."""

OptionsT = TypeVar("OptionsT", bound=Options)


class ByEntropy(Algorithm[OptionsT, PipelineState]):
    """A pipeline of blocks in which every position that is certain enough is accepted.

    The common part of ``FullAttnMultiBlock`` and ``EntropyThreshold``.
    """

    state = PipelineState
    caches = ALL_CACHES
    statistics = (NEGATIVE_ENTROPY,)

    def next_step(self, batch: CanvasBatch[OptionsT, PipelineState]) -> Step:
        return next_pipeline_step(batch)

    def decide(self, inputs: StepInputs[OptionsT, PipelineState]) -> Decision:
        found, state = predict(inputs, NEGATIVE_ENTROPY), inputs.state
        in_forced = (inputs.positions >= inputs.per_candidate(state.forced_start)) & (
            inputs.positions < inputs.per_candidate(state.forced_end)
        )
        accepted = certain_enough(
            -found.value,
            inputs.canvas_index,
            in_forced,
            inputs.per_candidate(state.threshold),
            inputs.num_canvases,
            is_llada=inputs.facts.family.sampler_family == "LLaDA",
        )
        return Decision(accepted, found.tokens)

    def on_commit(
        self,
        inputs: StepInputs[OptionsT, PipelineState],
        accepted: torch.Tensor,
        decision: Decision,
    ) -> None:
        note_committed(inputs.batch, inputs.canvas_index, inputs.positions, accepted)


class FullAttnMultiBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Nats = 0.5
    block_add_threshold: Probability = 0.1
    decoded_token_threshold: Probability = 0.95
    early_stop: Bool = False


class FullAttnMultiBlock(ByEntropy[FullAttnMultiBlockOptions]):
    """Several blocks at once; every position that is certain enough."""

    options = FullAttnMultiBlockOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        # d3LLM's evaluation scripts.
        if family.sampler_family == "LLaDA":
            return {"early_stop": True}
        return {"threshold": 0.4}

    def captured_options(
        self, options: FullAttnMultiBlockOptions
    ) -> FullAttnMultiBlockOptions:
        return FullAttnMultiBlockOptions(max_forwards=1, early_stop=True)

    def begin(
        self,
        batch: CanvasBatch[FullAttnMultiBlockOptions, Any],
        options: FullAttnMultiBlockOptions,
    ) -> PipelineState:
        return begin_pipeline(
            batch,
            options,
            add_progress=options.block_add_threshold,
            activate_progress=options.decoded_token_threshold,
        )


def certain_enough(
    entropy: torch.Tensor,
    canvas_index: torch.Tensor,
    in_forced: torch.Tensor,
    threshold: torch.Tensor,
    num_canvases: int,
    is_llada: bool,
) -> torch.Tensor:
    """d3LLM's rule: which candidates to commit.

    LLaDA accepts entropies up to the threshold and the lowest one of the canvas;
    Dream accepts those below it. If nothing inside the forced block was accepted, its
    lowest one is accepted too.

    Args:
        entropy: ``(N,)`` float64 nats; the candidates of all canvases, packed.
        canvas_index: ``(N,)`` int64, ascending: the canvas of each candidate.
        in_forced: ``(N,)`` bool: inside the canvas's first active block.
        threshold: ``(N,)`` float64 nats.

    Returns:
        ``(N,)`` bool.
    """
    accepted = entropy <= threshold if is_llada else entropy < threshold
    if is_llada:
        accepted |= first_best(-entropy, canvas_index, num_canvases)
    moved = count(accepted & in_forced, canvas_index, num_canvases)
    stuck = in_forced & (moved == 0)[canvas_index]
    return accepted | first_best(-entropy, canvas_index, num_canvases, stuck)
