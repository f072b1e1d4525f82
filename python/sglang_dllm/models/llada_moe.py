"""LLaDA-MoE-7B-A1B (arXiv 2509.24389): LLaDA with routed experts in every layer.

The experts are SGLang's fused layer. It has kernels on CUDA and a plain torch path on
other devices.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.moe.fused_moe_triton import FusedMoE
from sglang.srt.layers.moe.topk import TopK
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.utils import add_prefix
from torch import nn

from sglang_dllm.models.dense import DenseDiffusionLM, DenseShape
from sglang_dllm.models.weights import rename_llama


class RoutedExperts(nn.Module):
    """``sum_e p_e * expert_e(x)`` over the ``num_experts_per_tok`` likeliest experts.

    ``p`` is the float32 softmax over all experts. With ``norm_topk_prob`` the chosen
    probabilities are scaled to sum to one.
    """

    def __init__(
        self,
        config: Any,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        # The gate stays unquantized: an error in it would choose another expert.
        self.gate = ReplicatedLinear(
            config.hidden_size,
            config.num_experts,
            bias=False,
            quant_config=None,
            prefix=add_prefix("gate", prefix),
        )
        self.topk = TopK(
            top_k=config.num_experts_per_tok,
            layer_id=layer_id,
            renormalize=config.norm_topk_prob,
        )
        self.experts = FusedMoE(
            num_experts=config.num_experts,
            hidden_size=config.hidden_size,
            intermediate_size=config.expert_intermediate_size,
            layer_id=layer_id,
            top_k=config.num_experts_per_tok,
            reduce_results=True,
            quant_config=quant_config,
            prefix=add_prefix("experts", prefix),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """From ``(T, H)`` to ``(T, H)``. ``x`` may be overwritten."""
        scores, _ = self.gate(x)
        return self.experts(x, self.topk(x, scores))


class LLaDAMoEModelLM(DenseDiffusionLM):
    """LLaDA-MoE: Llama blocks with normed query and key heads and with experts."""

    def __init__(
        self,
        config: Any,
        quant_config: QuantizationConfig | None = None,
        prefix: str = "",
    ) -> None:
        shape = DenseShape.from_llama_config(
            config,
            qkv_bias=False,
            intermediate_size=config.expert_intermediate_size,
            qk_norm=True,
        )
        super().__init__(config, shape, quant_config, prefix)

    def make_mlp(
        self,
        shape: DenseShape,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> nn.Module:
        """This layer's experts."""
        return RoutedExperts(self.config, layer_id, quant_config, prefix)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:  # type: ignore[override]
        experts = FusedMoE.make_expert_params_mapping(
            ckpt_gate_proj_name="gate_proj",
            ckpt_down_proj_name="down_proj",
            ckpt_up_proj_name="up_proj",
            num_experts=self.config.num_experts,
        )
        super().load_weights(weights, rename_llama, experts)


class LLaDAMoEModel(LLaDAMoEModelLM):
    """The same model. Some config.json name its inner module."""
