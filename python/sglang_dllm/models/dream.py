"""Dream-v0, Dream-Coder, DiffuCoder, d3LLM-Dream: Qwen2's tensor names.

The right shift of its logits is not here but in which rows a decoder reads
(``families.Family.shift``).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig

from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape


def rename(name: str) -> str | None:
    """Our name of a Dream tensor."""
    if "rotary_emb.inv_freq" in name:
        return None
    return name.removeprefix("model.")


class DreamModel(DenseDiffusionLM):
    """Dream (Dream 7B, 2025): a Qwen2.5 block without the causal mask."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shape = DenseShape(
            hidden_size=config.hidden_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            intermediate_size=config.intermediate_size,
            vocab_size=config.vocab_size,
            max_positions=config.max_position_embeddings,
            rope_theta=config.rope_theta,
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=True,
            tie_embeddings=bool(config.tie_word_embeddings),
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename)
