"""Llama's, Qwen2's and Qwen3's block without the causal mask, and their tensor names.

Architectures with this layout differ in two facts: biases of queries, keys and values,
and norms of each query and key head.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from sglang_dllm.models.configs import published_size
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import rename_llama


class LlamaLayoutLM(DenseDiffusionLM):
    """The base of such an architecture.

    Attributes:
        qkv_bias, qk_norm: as in ``DenseShape``.
    """

    qkv_bias: ClassVar[bool] = False
    qk_norm: ClassVar[bool] = False

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shape = DenseShape.from_llama_config(
            config,
            qkv_bias=self.qkv_bias,
            qk_norm=self.qk_norm,
            intermediate_size=published_size(config, "intermediate_size"),
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename_llama)
