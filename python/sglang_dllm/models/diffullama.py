"""DiffuLLaMA (arXiv 2410.17891): Llama-2 weights adapted to full attention.

Its config.json says ``LlamaForCausalLM``, which stays SGLang's autoregressive model:
the launch line names this one instead, and the mask id (``docs/models.md``). The right
shift of its logits is ``families.Family.shift``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.utils.hf_transformers_utils import get_rope_config

from sglang_dllm.errors import ConfigError
from sglang_dllm.models.configs import check_fields
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape

# What the architecture can express but this module does not compute.
_REQUIRED: dict[str, object] = {
    "attention_bias": False,
    "hidden_act": "silu",
    "mlp_bias": False,
}


def rename(name: str) -> str | None:
    """Our name of a Llama tensor."""
    if "rotary_emb.inv_freq" in name:
        return None
    return name.removeprefix("model.")


class DiffuLlamaModel(DenseDiffusionLM):
    """DiffuLLaMA: a Llama block without the causal mask."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        head_dim = config.hidden_size // config.num_attention_heads
        check_fields(config, "DiffuLlamaModel", _REQUIRED | {"head_dim": head_dim})
        rope_theta, rope = get_rope_config(config)
        rope_type = (rope or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ConfigError(
                f"config.json: rope_type={rope_type!r} is not supported for "
                "DiffuLlamaModel; expected 'default'"
            )
        shape = DenseShape(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            rope_theta=rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=False,
            tie_embeddings=bool(config.tie_word_embeddings),
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename)
