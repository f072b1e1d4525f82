"""d3LLM's multi-block decoding by entropy (arXiv 2601.07568).

Sources: ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sglang_dllm.decoding import block_pipeline as blocks
from sglang_dllm.decoding.algorithm import Algorithm, Decision, StepInputs
from sglang_dllm.decoding.cache import CACHES
from sglang_dllm.decoding.canvas_batch import CanvasBatch, Step
from sglang_dllm.decoding.options import BlockSize, Bool, Nats, Options, Probability
from sglang_dllm.decoding.prediction import predict
from sglang_dllm.decoding.selection import count, first_best
from sglang_dllm.decoding.statistics import Statistic
from sglang_dllm.models.facts import Family

NEGATIVE_ENTROPY = Statistic("negative_entropy", eps=1e-12)
"""As in d3LLM; thresholds are nats over the full vocabulary."""


class FullAttnMultiBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Nats = 0.5
    block_add_threshold: Probability = 0.1
    decoded_token_threshold: Probability = 0.95
    early_stop: Bool = False


class FullAttnMultiBlock(Algorithm):
    """Several blocks at once; every position that is certain enough."""

    options: ClassVar[type[Options]] = FullAttnMultiBlockOptions
    caches = CACHES
    statistics = (NEGATIVE_ENTROPY,)

    def defaults(self, family: Family) -> dict[str, Any]:
        # d3LLM's evaluation scripts.
        if family.sampler_family == "LLaDA":
            return {"early_stop": True}
        return {"threshold": 0.4}

    def progress(self, canvases: CanvasBatch) -> tuple[torch.Tensor, torch.Tensor]:
        """``(R,)`` float64 each: when to add a block, when to activate one."""
        return (
            canvases.option("block_add_threshold"),
            canvases.option("decoded_token_threshold"),
        )

    def begin(self, canvases: CanvasBatch) -> dict[str, torch.Tensor]:
        _, activate = self.progress(canvases)
        return blocks.begin(canvases, activate)

    def plan(self, canvases: CanvasBatch) -> Step:
        return blocks.plan(canvases, *self.progress(canvases))

    def choose(self, judged: StepInputs) -> Decision:
        found = predict(judged, NEGATIVE_ENTROPY)
        step, canvas = judged.step, judged.canvas_index
        assert step.forced_start is not None and step.forced_end is not None
        accepted = certain_enough(
            -found.value,
            canvas,
            (judged.positions >= step.forced_start[canvas])
            & (judged.positions < step.forced_end[canvas]),
            judged.option("threshold"),
            judged.num_canvases,
            is_llada=judged.facts.family.sampler_family == "LLaDA",
        )
        return Decision(accepted, found.tokens)

    def committed(
        self, judged: StepInputs, accepted: torch.Tensor, choice: Decision
    ) -> None:
        blocks.committed(
            judged.canvases, judged.canvas_index, judged.positions, accepted
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
    Dream accepts those below it. Where nothing inside the forced block was accepted,
    its lowest one is.

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
