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
from sglang.srt.utils.hf_transformers_utils import get_rope_config

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.configs import check_fields, published_size
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import rename_llama

# The config can express other values. This module would compute them wrongly.
_REQUIRED: dict[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
}


class DiffuLlamaModel(DenseDiffusionLM):
    """DiffuLLaMA: a Llama block without the causal mask."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        heads = published_size(config, "num_attention_heads")
        head_dim = config.hidden_size // heads
        check_fields(config, "DiffuLlamaModel", _REQUIRED | {"head_dim": head_dim})
        rope_theta, rope = get_rope_config(config)
        rope_type = (rope or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(
                f"config.json: rope_type={rope_type!r} is not supported for "
                "DiffuLlamaModel; expected 'default'"
            )
        shape = DenseShape.from_llama_config(
            config,
            qkv_bias=False,
            intermediate_size=published_size(config, "intermediate_size"),
            rope_theta=rope_theta,
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename_llama)
