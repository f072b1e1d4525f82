"""Tiny random iLLaDA and A2D checkpoints in the exact Hugging Face layout.

All have Llama's tensor names, and none has its mask id in config.json. A2D tokenizers
name it; iLLaDA's has it in its vocabulary and says nowhere that it is one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from helpers.tiny_checkpoints import (
    random_block,
    random_top,
    write_model,
    write_tokenizer,
)

ILLADA_TOKENS = {"<[BOS]>": 258, "<[PAD]>": 259, "<[EOS]>": 262, "<[MASK]>": 268}
QWEN_TOKENS = {
    "<|endoftext|>": 257,
    "<|im_start|>": 258,
    "<|im_end|>": 261,
    "<|mask|>": 279,
}
LLAMA3_TOKENS = {
    "<|begin_of_text|>": 257,
    "<|end_of_text|>": 259,
    "<|start_header_id|>": 260,
    "<|end_header_id|>": 261,
    "<|eot_id|>": 264,
    "<|mask|>": 276,
}

ILLADA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ message['role'] + ': ' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
# Qwen3's: an empty thought goes before the answer where a request asks for none.
QWEN_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
LLAMA3_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)

_NAMES = {
    "norm1.weight": "input_layernorm.weight",
    "norm2.weight": "post_attention_layernorm.weight",
    "q.weight": "self_attn.q_proj.weight",
    "k.weight": "self_attn.k_proj.weight",
    "v.weight": "self_attn.v_proj.weight",
    "o.weight": "self_attn.o_proj.weight",
    "gate.weight": "mlp.gate_proj.weight",
    "up.weight": "mlp.up_proj.weight",
    "down.weight": "mlp.down_proj.weight",
}
_BIASES = {f"{x}.bias": f"self_attn.{x}_proj.bias" for x in "qkv"}


def write_illada(
    path: str | Path, *, tied: bool = True, num_hidden_layers: int = 2, **others: Any
) -> Path:
    """Write an iLLaDA folder and return it. `others` are those of `_write`."""
    config: dict[str, Any] = {
        "architectures": ["ILLaDAForCausalLM"],
        "attention_bias": False,
        "auto_map": {
            "AutoConfig": "configuration_illada.ILLaDAConfig",
            "AutoModel": "modeling_illada.ILLaDAForCausalLM",
            "AutoModelForCausalLM": "modeling_illada.ILLaDAForCausalLM",
        },
        "bos_token_id": ILLADA_TOKENS["<[BOS]>"],
        "eos_token_id": ILLADA_TOKENS["<[EOS]>"],
        "layer_norm_eps": None,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "illada",
        "pad_token_id": ILLADA_TOKENS["<[PAD]>"],
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
    }
    if not tied:
        # The tied head is the default, which transformers leaves out of the file.
        config["tie_word_embeddings"] = False
    marks = ILLADA_TOKENS["<[MASK]>"], ILLADA_TOKENS["<[EOS]>"]
    path = _write(path, config, marks, num_hidden_layers, tied=tied, **others)
    named = {"bos_token": "<[BOS]>", "eos_token": "<[EOS]>", "pad_token": "<[PAD]>"}
    write_tokenizer(path, ILLADA_TOKENS, 300, ILLADA_TEMPLATE, named)
    return path


def write_a2d_qwen3(
    path: str | Path, *, tied: bool = True, num_hidden_layers: int = 2, **others: Any
) -> Path:
    """Write an A2DQwen3LMHeadModel folder; a head is twice hidden / heads wide."""
    config = _qwen("Qwen3", num_hidden_layers, tied)
    config |= {"attention_bias": False, "head_dim": 32}
    return _write_qwen(path, config, num_hidden_layers, **others)


def write_a2d_qwen2(
    path: str | Path, *, tied: bool = True, num_hidden_layers: int = 2, **others: Any
) -> Path:
    """Write an A2DQwen2LMHeadModel folder and return it."""
    config = _qwen("Qwen2", num_hidden_layers, tied)
    return _write_qwen(path, config, num_hidden_layers, biases=True, **others)


def write_a2d_llama(
    path: str | Path, *, tied: bool = True, num_hidden_layers: int = 2, **others: Any
) -> Path:
    """Write an A2DLlamaLMHeadModel folder, of a Llama 3, and return it."""
    config: dict[str, Any] = {
        "architectures": ["A2DLlamaLMHeadModel"],
        "attention_bias": False,
        "bos_token_id": LLAMA3_TOKENS["<|begin_of_text|>"],
        "eos_token_id": LLAMA3_TOKENS["<|end_of_text|>"],
        "head_dim": 16,
        "max_position_embeddings": 8192,
        "mlp_bias": False,
        "model_type": "a2d-llama",
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 256,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": tied,
    }
    marks = LLAMA3_TOKENS["<|mask|>"], LLAMA3_TOKENS["<|end_of_text|>"]
    path = _write(path, config, marks, num_hidden_layers, tied=tied, **others)
    named = {
        "bos_token": "<|begin_of_text|>",
        "eos_token": "<|end_of_text|>",
        "mask_token": "<|mask|>",
    }
    write_tokenizer(path, LLAMA3_TOKENS, 300, LLAMA3_TEMPLATE, named)
    return path


def _qwen(base: str, num_hidden_layers: int, tied: bool) -> dict[str, Any]:
    name = base.lower()
    return {
        "architectures": [f"A2D{base}LMHeadModel"],
        "auto_map": {
            "AutoConfig": f"modeling_{name}.A2D{base}Config",
            "AutoModel": f"modeling_{name}.A2D{base}LMHeadModel",
            "AutoModelForMaskedLM": f"modeling_{name}.A2D{base}LMHeadModel",
        },
        "bos_token_id": QWEN_TOKENS["<|endoftext|>"],
        "eos_token_id": QWEN_TOKENS["<|im_end|>"],
        "layer_types": ["full_attention"] * num_hidden_layers,
        "max_position_embeddings": 4096,
        "max_window_layers": num_hidden_layers,
        "model_type": f"a2d-{name}",
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "sliding_window": None,
        "tie_word_embeddings": tied,
        "use_sliding_window": False,
    }


def _write_qwen(
    path: str | Path, config: dict[str, Any], num_hidden_layers: int, **others: Any
) -> Path:
    marks = QWEN_TOKENS["<|mask|>"], QWEN_TOKENS["<|im_end|>"]
    tied = config["tie_word_embeddings"]
    path = _write(path, config, marks, num_hidden_layers, tied=tied, **others)
    named = {
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "mask_token": "<|mask|>",
    }
    write_tokenizer(path, QWEN_TOKENS, 300, QWEN_TEMPLATE, named)
    return path


def _write(
    path: str | Path,
    config: dict[str, Any],
    marks: tuple[int, int],
    num_hidden_layers: int,
    *,
    tied: bool,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    biases: bool = False,
    num_shards: int = 1,
    seed: int = 0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Weights and config.json; `config` has what differs between the architectures."""
    mask_id, eos_id = marks
    width, mlp_width, vocab_size = 64, 160, 300
    rng = torch.Generator().manual_seed(seed)
    top = random_top(rng, width, vocab_size, vocab_size, mask_id, eos_id, head_scale)
    if tied:
        # One tensor for both; the mask stays faint, as `random_top` has it.
        top["embed"] = top["head"]
        top["embed"][mask_id] *= 0.2
    tensors = {
        "model.embed_tokens.weight": top["embed"],
        "model.norm.weight": top["norm"],
    }
    if not tied:
        tensors["lm_head.weight"] = top["head"]
    names = _NAMES | (_BIASES if biases else {})
    sizes = width, num_attention_heads, num_key_value_heads, mlp_width
    for i in range(num_hidden_layers):
        block = random_block(rng, *sizes)
        if config["model_type"] == "a2d-qwen3":
            block = _with_wide_heads(block, random_block(rng, *sizes))
            for part in ("q_norm", "k_norm"):
                # As in LLaDA-MoE: two gains of 2 make the deviation of scores 4.
                gain = 2 + 0.2 * torch.randn(config["head_dim"], generator=rng)
                tensors[f"model.layers.{i}.self_attn.{part}.weight"] = gain
        for ours, theirs in names.items():
            tensors[f"model.layers.{i}.{theirs}"] = block[ours]
    config = config | {
        "attention_dropout": 0.0,
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": mlp_width,
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "transformers_version": "4.57.1",
        "use_cache": True,
        "vocab_size": vocab_size,
    }
    return write_model(path, config, tensors, num_shards, dtype)


def _with_wide_heads(
    block: dict[str, torch.Tensor], other: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """A block whose heads are as wide as those of two blocks together."""
    wide = {
        name: torch.cat([block[name], other[name]])
        for name in ("q.weight", "k.weight", "v.weight")
    }
    out = torch.cat([block["o.weight"], other["o.weight"]], dim=1)
    return block | wide | {"o.weight": out / 2**0.5}
