"""One block after the other by entropy: d3LLM ``generate``, dParallel."""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from sglang_dllm.decoding.algorithms.full_attn_multi_block import FullAttnMultiBlock
from sglang_dllm.decoding.canvas_batch import CanvasBatch
from sglang_dllm.decoding.options import BlockSize, Bool, Nats, Options
from sglang_dllm.models.facts import Family


class EntropyThresholdOptions(Options):
    block_size: BlockSize = 32
    threshold: Nats = 0.5
    early_stop: Bool = False


class EntropyThreshold(FullAttnMultiBlock):
    """Multi-block decoding in which a block joins once the last one is finished."""

    options: ClassVar[type[Options]] = EntropyThresholdOptions

    def defaults(self, family: Family) -> dict[str, Any]:
        # dParallel's evaluation scripts.
        return {"threshold": 0.45} if family.sampler_family == "Dream" else {}

    def progress(self, canvases: CanvasBatch) -> tuple[torch.Tensor, torch.Tensor]:
        all_of_it = torch.ones(len(canvases), device=canvases.device).double()
        return all_of_it, all_of_it
