"""One block after the other by entropy: d3LLM ``generate``, dParallel."""

from __future__ import annotations

from typing import Any

from sglang_dllm.decoding.algorithms.full_attn_multi_block import ByEntropy
from sglang_dllm.decoding.block_pipeline import PipelineState, begin_pipeline
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.options import BlockSize, Bool, Nats, Options
from sglang_dllm.models.facts import Family


class EntropyThresholdOptions(Options):
    block_size: BlockSize = 32
    threshold: Nats = 0.5
    early_stop: Bool = False


class EntropyThreshold(ByEntropy[EntropyThresholdOptions]):
    """Multi-block decoding in which a block starts when the last one is finished."""

    options = EntropyThresholdOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        # dParallel's evaluation scripts.
        return {"threshold": 0.45} if family.sampler_family == "Dream" else {}

    def captured_options(
        self, options: EntropyThresholdOptions
    ) -> EntropyThresholdOptions:
        return EntropyThresholdOptions(max_forwards=1, early_stop=True)

    def begin(
        self,
        batch: CanvasBatch[EntropyThresholdOptions, Any],
        options: EntropyThresholdOptions,
    ) -> PipelineState:
        return begin_pipeline(batch, options, add_progress=1.0, activate_progress=1.0)
