"""DiffuLLaMA (arXiv 2410.17891): Llama-2 weights adapted to full attention.

Its config.json says ``LlamaForCausalLM``, and that name stays SGLang's autoregressive
model. The launch line names this class and the mask id (``docs/models.md``). The shift
of its logits is ``models.facts.Family.shift``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from sglang_dllm.models.configs import published_size
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import rename_llama


class DiffuLlamaModel(DenseDiffusionLM):
    """DiffuLLaMA: a Llama block without the causal mask."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shape = DenseShape.from_llama_config(
            config,
            qkv_bias=False,
            intermediate_size=published_size(config, "intermediate_size"),
            head_dim=config.head_dim,
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename_llama)
