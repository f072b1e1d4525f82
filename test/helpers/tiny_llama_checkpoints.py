"""Tiny random LLaDA-MoE and DiffuLLaMA checkpoints in the exact Hugging Face layout.

Both have Llama's tensor names, and neither has its mask id in config.json: the server
learns it from the flags kept here. Tokenizer and the shape of the random weights are
``tiny_checkpoints``'.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from helpers.tiny_checkpoints import (
    random_block,
    random_top,
    write_json,
    write_model,
    write_tokenizer,
)

LLADA_MOE_TOKENS = {
    "<|startoftext|>": 258,
    "<|endoftext|>": 260,
    "<role>": 262,
    "</role>": 263,
    "<|role_end|>": 264,
    "<|mask|>": 274,
}
DIFFULLAMA_TOKENS = {"<s>": 257, "</s>": 261, "<mask>": 277}

# `<role>` is a token of its own, as in the real tokenizer.
LLADA_MOE_TEMPLATE = (
    "{% for message in messages %}"
    "{% set role = {'user': 'HUMAN'}.get(message['role'], message['role'] | upper) %}"
    "{{ '<role>' + role + '</role>' + message['content'] + '<|role_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<role>ASSISTANT</role>' }}{% endif %}"
)

LLADA_MOE_FLAGS = (
    "--json-model-override-args",
    json.dumps({"mask_token_id": LLADA_MOE_TOKENS["<|mask|>"]}),
)
DIFFULLAMA_FLAGS = (
    "--json-model-override-args",
    json.dumps(
        {
            "architectures": ["DiffuLlamaModel"],
            "mask_token_id": DIFFULLAMA_TOKENS["<mask>"],
        }
    ),
)

_NAMES = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "o.weight": "self_attn.o_proj.weight",
}
_MLP_NAMES = {
    "gate.weight": "gate_proj.weight",
    "up.weight": "up_proj.weight",
    "down.weight": "down_proj.weight",
}


def write_llada_moe(
    path: str | Path,
    *,
    architecture: str = "LLaDAMoEModelLM",
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 4,
    expert_intermediate_size: int = 32,
    num_experts: int = 8,
    num_experts_per_tok: int = 2,
    norm_topk_prob: bool | None = None,
    vocab_size: int = 300,
    num_shards: int = 1,
    seed: int = 0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a LLaDA-MoE folder and return it (`head_scale` as in `write_llada`)."""
    mask_id, eos_id = LLADA_MOE_TOKENS["<|mask|>"], LLADA_MOE_TOKENS["<|endoftext|>"]
    rng = torch.Generator().manual_seed(seed)
    tensors = _top(rng, hidden_size, vocab_size, mask_id, eos_id, head_scale)
    head_dim = hidden_size // num_attention_heads
    for i in range(num_hidden_layers):
        layer = f"model.layers.{i}"
        heads = num_attention_heads, num_key_value_heads
        experts = [
            random_block(rng, hidden_size, *heads, expert_intermediate_size)
            for _ in range(num_experts)
        ]
        for ours, theirs in _NAMES.items():
            tensors[f"{layer}.{theirs}"] = experts[0][ours]
        for part in ("q_norm", "k_norm"):
            # Normed heads score with a deviation of 1: two gains of 2 make it the 4
            # of `random_block`.
            gain = 2 + 0.2 * torch.randn(head_dim, generator=rng)
            tensors[f"{layer}.self_attn.{part}.weight"] = gain
        router = torch.randn(num_experts, hidden_size, generator=rng)
        tensors[f"{layer}.mlp.gate.weight"] = 2 * router / math.sqrt(hidden_size)
        for expert, block in enumerate(experts):
            for ours, theirs in _MLP_NAMES.items():
                # The likeliest experts' shares sum to less than one.
                gain = 2.0 if ours == "down.weight" else 1.0
                tensors[f"{layer}.mlp.experts.{expert}.{theirs}"] = gain * block[ours]
    config = {
        "architectures": [architecture],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_lladamoe.LLaDAConfig",
            "AutoModel": "modeling_lladamoe.LLaDAMoEModel",
            "AutoModelForCausalLM": "modeling_lladamoe.LLaDAMoEModelLM",
        },
        "clip_qkv": None,
        "dense_intermediate_size": 4 * expert_intermediate_size,
        "eos_token_id": eos_id,
        "expert_intermediate_size": expert_intermediate_size,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "max_position_embeddings": 8192,
        "model_type": "llada",
        "moe_layer_freq": [1] * num_hidden_layers,
        "moe_router_enable_expert_bias": False,
        "moe_router_score_function": "softmax",
        "norm_topk_prob": norm_topk_prob,
        "num_attention_heads": num_attention_heads,
        "num_experts": num_experts,
        "num_experts_per_tok": num_experts_per_tok,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "output_router_logits": False,
        "pad_token_id": eos_id,
        "partial_rotary_factor": 1,
        "qk_layernorm": True,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 50000,
        "routed_scaling_factor": 1,
        "router_aux_loss_coef": 0.01,
        "router_num_group": None,
        "router_topk_group": None,
        "shared_expert_intermediate_size": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.53.2",
        "use_cache": False,
        "vocab_size": vocab_size,
    }
    path = write_model(path, config, tensors, num_shards, dtype)
    named = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    named |= {"bos_token": "<|startoftext|>", "mask_token": "<|mask|>"}
    write_tokenizer(path, LLADA_MOE_TOKENS, vocab_size, LLADA_MOE_TEMPLATE, named)
    return path


def write_diffullama(
    path: str | Path,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 4,
    intermediate_size: int = 160,
    vocab_size: int = 300,
    num_shards: int = 1,
    seed: int = 0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a DiffuLLaMA folder: one of Llama's, by all that config.json says."""
    mask_id, eos_id = DIFFULLAMA_TOKENS["<mask>"], DIFFULLAMA_TOKENS["</s>"]
    rng = torch.Generator().manual_seed(seed)
    tensors = _top(rng, hidden_size, vocab_size, mask_id, eos_id, head_scale)
    names = _NAMES | {ours: f"mlp.{theirs}" for ours, theirs in _MLP_NAMES.items()}
    for i in range(num_hidden_layers):
        heads = num_attention_heads, num_key_value_heads
        block = random_block(rng, hidden_size, *heads, intermediate_size)
        for ours, theirs in names.items():
            tensors[f"model.layers.{i}.{theirs}"] = block[ours]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": DIFFULLAMA_TOKENS["<s>"],
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.44.2",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    path = write_model(path, config, tensors, num_shards, dtype)
    generation_config = {"_from_model_config": True, "eos_token_id": eos_id}
    write_json(path / "generation_config.json", generation_config)
    named = {"bos_token": "<s>", "eos_token": "</s>", "mask_token": "<mask>"}
    write_tokenizer(path, DIFFULLAMA_TOKENS, vocab_size, None, named)
    return path


def _top(
    rng: torch.Generator,
    width: int,
    vocab_size: int,
    mask_id: int,
    eos_id: int,
    head_scale: float,
) -> dict[str, torch.Tensor]:
    top = random_top(rng, width, vocab_size, vocab_size, mask_id, eos_id, head_scale)
    return {
        "model.embed_tokens.weight": top["embed"],
        "model.norm.weight": top["norm"],
        "lm_head.weight": top["head"],
    }
