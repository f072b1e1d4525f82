"""Oracle models of LLaDA-MoE and DiffuLLaMA, from transformers' Qwen3-MoE and Llama.

LLaDA-MoE's block (OLMoE's, but with each head normed by itself) is Qwen3-MoE's, which
keeps a layer's experts in two stacked tensors. Neither has a causal mask here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from reference.models import (
    ReferenceModel,
    build,
    read_config,
    read_tensors,
    rope_parameters,
)

# Values the mapping onto Qwen3-MoE relies on; any other value is another model.
_LLADA_MOE_REQUIRED = {
    "attention_bias": False,
    "clip_qkv": None,
    "moe_router_enable_expert_bias": False,
    "moe_router_score_function": "softmax",
    "partial_rotary_factor": 1,
    "qk_layernorm": True,
    "routed_scaling_factor": 1,
    "shared_expert_intermediate_size": None,
    "tie_word_embeddings": False,
}


def load_llada_moe(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    """Load a LLaDA-MoE folder as a bidirectional Qwen3-MoE."""
    config = read_config(path)
    for key, wanted in _LLADA_MOE_REQUIRED.items():
        if config.get(key, wanted) != wanted:
            raise ValueError(f"{key}: expected {wanted!r}, found {config[key]!r}")
    if set(config["moe_layer_freq"]) != {1}:
        raise ValueError("expected experts in every layer")
    qwen_config = Qwen3MoeConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        head_dim=config["hidden_size"] // config["num_attention_heads"],
        moe_intermediate_size=config["expert_intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        num_key_value_heads=config["num_key_value_heads"],
        num_experts=config["num_experts"],
        num_experts_per_tok=config["num_experts_per_tok"],
        norm_topk_prob=bool(config["norm_topk_prob"]),
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        hidden_act=config["hidden_act"],
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    tensors = read_tensors(path)
    for i in range(config["num_hidden_layers"]):
        _stack_experts(tensors, f"model.layers.{i}.mlp.experts", config["num_experts"])
    module = build(Qwen3MoeForCausalLM, qwen_config, tensors, dtype, device)
    return ReferenceModel(module, "llada", _mask_id(path), config["eos_token_id"])


def load_diffullama(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    """Load a DiffuLLaMA folder as a bidirectional Llama, read one position late."""
    config = read_config(path)
    llama_config = LlamaConfig(
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        intermediate_size=config["intermediate_size"],
        num_hidden_layers=config["num_hidden_layers"],
        num_attention_heads=config["num_attention_heads"],
        head_dim=config.get("head_dim"),
        num_key_value_heads=config.get("num_key_value_heads"),
        max_position_embeddings=config["max_position_embeddings"],
        rms_norm_eps=config["rms_norm_eps"],
        hidden_act=config["hidden_act"],
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=False,
        attn_implementation="eager",
    )
    module = build(LlamaForCausalLM, llama_config, read_tensors(path), dtype, device)
    return ReferenceModel(module, "dream", _mask_id(path), config["eos_token_id"])


def _mask_id(path: str | Path) -> int:
    # Neither config.json has it; the published samplers ask the tokenizer or hard-code.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    return int(tokenizer.mask_token_id)


def _stack_experts(
    tensors: dict[str, torch.Tensor], prefix: str, num_experts: int
) -> None:
    """Replace a layer's expert tensors by the two stacks of Qwen3-MoE, in place."""

    def take(part: str) -> list[torch.Tensor]:
        return [tensors.pop(f"{prefix}.{e}.{part}.weight") for e in range(num_experts)]

    pairs = zip(take("gate_proj"), take("up_proj"), strict=True)
    tensors[f"{prefix}.gate_up_proj"] = torch.stack([torch.cat(p) for p in pairs])
    tensors[f"{prefix}.down_proj"] = torch.stack(take("down_proj"))
