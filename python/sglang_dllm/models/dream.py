"""Dream-v0, Dream-Coder, DiffuCoder, d3LLM-Dream, with Qwen2's tensor names.

The shift of its logits is ``models.facts.Family.shift``. The denoiser applies it when
it chooses the rows of logits.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from sglang_dllm.models.configs import published_size
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import rename_llama


class DreamModel(DenseDiffusionLM):
    """Dream (Dream 7B, 2025): a Qwen2.5 block without the causal mask."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shape = DenseShape.from_llama_config(
            config,
            # Without biases the block is Llama's.
            qkv_bias=config.attention_bias,
            intermediate_size=published_size(config, "intermediate_size"),
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename_llama)
