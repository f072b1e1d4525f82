"""d3LLM's multi-block decoding by entropy (arXiv 2601.07568).

Sources: ``generate_multi_block`` (LLaDA) and ``_sample_multi_block`` (Dream).
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sglang_dllm.decoding.algorithm import Algorithm, Choice, DecodingState, Judged
from sglang_dllm.decoding.blocks import Blocks
from sglang_dllm.decoding.canvas import Canvas
from sglang_dllm.decoding.options import BlockSize, Bool, Nats, Options, Share
from sglang_dllm.decoding.prediction import predict
from sglang_dllm.decoding.selection import count, first_best
from sglang_dllm.decoding.statistics import negative_entropy
from sglang_dllm.families import Family, ModelFacts

ENTROPY_EPS = 1e-12
"""Inside the logarithm, as in d3LLM; thresholds are nats over the full vocabulary."""


class FullAttnMultiBlockOptions(Options):
    block_size: BlockSize = 32
    threshold: Nats = 0.5
    block_add_threshold: Share = 0.1
    decoded_token_threshold: Share = 0.95
    early_stop: Bool = False


class FullAttnMultiBlock(Algorithm):
    """Several blocks at once; every position that is certain enough."""

    options: ClassVar[type[Options]] = FullAttnMultiBlockOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        # d3LLM's evaluation scripts.
        if family.lineage == "LLaDA":
            return {"early_stop": True}
        return {"threshold": 0.4}

    def start(self, canvas: Canvas, options: Any, facts: ModelFacts) -> DecodingState:
        return Blocks(
            canvas,
            self,
            options,
            facts,
            options.block_add_threshold,
            options.decoded_token_threshold,
        )

    def choose(self, judged: Judged) -> Choice:
        found = predict(judged, negative_entropy(ENTROPY_EPS))
        ranges = [step.forced for step in judged.steps]
        answers = [state.canvas.prompt_len for state in judged.states]
        forced = judged.per_canvas(
            [
                (start - answer, end - answer)
                for (start, end), answer in zip(ranges, answers, strict=True)
            ],
            torch.int64,
        )[judged.canvas_index]
        accepted = certain_enough(
            -found.value,
            judged.canvas_index,
            (judged.positions >= forced[:, 0]) & (judged.positions < forced[:, 1]),
            judged.option("threshold"),
            judged.num_canvases,
            is_llada=judged.facts.family.lineage == "LLaDA",
        )
        return Choice(accepted, found.tokens)


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
        everywhere = torch.ones_like(in_forced)
        accepted |= first_best(-entropy, canvas_index, everywhere, num_canvases)
    moved = count(accepted & in_forced, canvas_index, num_canvases)
    stuck = in_forced & (moved == 0)[canvas_index]
    return accepted | first_best(-entropy, canvas_index, stuck, num_canvases)
