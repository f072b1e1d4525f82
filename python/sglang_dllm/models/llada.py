"""LLaDA-8B (Base, Instruct), LLaDA-1.5 and d3LLM-LLaDA, with OLMo's tensor names."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.models.utils import WeightsMapper

from sglang_dllm.models.configs import published_size, rope_of_config
from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import is_buffer

_TOP = {"wte": "embed_tokens", "ln_f": "norm", "ff_out": "lm_head"}
# ff_out is the MLP's down projection in a block, and the head at the top level.
_IN_BLOCK = {
    "attn_norm": "input_layernorm",
    "ff_norm": "post_attention_layernorm",
    "q_proj": "self_attn.q_proj",
    "k_proj": "self_attn.k_proj",
    "v_proj": "self_attn.v_proj",
    "attn_out": "self_attn.o_proj",
    "ff_proj": "mlp.gate_proj",
    "up_proj": "mlp.up_proj",
    "ff_out": "mlp.down_proj",
}
_TOP_NAME = re.compile(r"(\w+)\.(\w+)")
_BLOCK_NAME = re.compile(r"blocks\.(\d+)\.(\w+)\.(.+)")


def rename(name: str) -> str | None:
    """Our name of a LLaDA tensor; None for one that is ignored."""
    if is_buffer(name):
        return None
    name = name.removeprefix("model.").removeprefix("transformer.")
    if match := _TOP_NAME.fullmatch(name):
        part, leaf = match.groups()
        return f"{_TOP.get(part, part)}.{leaf}"
    if match := _BLOCK_NAME.fullmatch(name):
        layer, part, leaf = match.groups()
        return f"layers.{layer}.{_IN_BLOCK.get(part, part)}.{leaf}"
    return name


class LLaDAModelLM(DenseDiffusionLM):
    """LLaDA (arXiv 2502.09992): a Llama block without the causal mask."""

    hf_to_sglang_mapper: ClassVar[WeightsMapper] = WeightsMapper(
        orig_to_new_prefix={
            "model.transformer.blocks.": "model.layers.",
            "model.transformer.ff_out": "lm_head",
        },
        orig_to_new_suffix={f".{x}": f".{ours}" for x, ours in _IN_BLOCK.items()},
    )
    """A checkpoint's layer names and ours, for the lists of quantized checkpoints."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        num_heads = published_size(config, "num_attention_heads")
        shape = DenseShape(
            hidden_size=config.d_model,
            num_layers=config.n_layers,
            head_dim=config.d_model // num_heads,
            num_heads=num_heads,
            num_kv_heads=published_size(config, "num_key_value_heads"),
            intermediate_size=published_size(config, "intermediate_size"),
            vocab_size=config.vocab_size,
            max_positions=config.max_sequence_length,
            rope=rope_of_config(config),
            rms_norm_eps=config.rms_norm_eps,
            qkv_bias=config.include_qkv_bias,
            tie_embeddings=config.weight_tying,
        )
        super().__init__(config, shape, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        super().load_weights(weights, rename)
