"""Oracle models of iLLaDA and A2D, from transformers' Llama, Qwen2 and Qwen3.

None has a causal mask here, and each row of logits predicts its own position.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from reference.models import (
    ReferenceModel,
    architecture_of,
    build,
    read_config,
    read_tensors,
    rope_parameters,
)

CLASSES: dict[str, tuple[type[Any], type[Any]]] = {
    "ILLaDAForCausalLM": (LlamaConfig, LlamaForCausalLM),
    "A2DLlamaLMHeadModel": (LlamaConfig, LlamaForCausalLM),
    "A2DQwen2LMHeadModel": (Qwen2Config, Qwen2ForCausalLM),
    "A2DQwen3LMHeadModel": (Qwen3Config, Qwen3ForCausalLM),
}
"""The published classes subclass these, or repeat the first line by line."""

_SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
_SIZES += ("num_attention_heads", "num_key_value_heads", "max_position_embeddings")
_SIZES += ("rms_norm_eps", "hidden_act")


def load_a2d(
    path: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> ReferenceModel:
    """Load an iLLaDA or A2D folder as a bidirectional model of transformers."""
    config = read_config(path)
    config_class, model_class = CLASSES[architecture_of(config)]
    sizes = {name: config[name] for name in _SIZES}
    if "head_dim" in config:
        sizes["head_dim"] = config["head_dim"]
    built = config_class(
        **sizes,
        rope_parameters=rope_parameters(config),
        tie_word_embeddings=False,  # `build` copies the embedding to a head
        attn_implementation="eager",
    )
    module = build(model_class, built, read_tensors(path), dtype, device)
    return ReferenceModel(module, "llada", _mask_id(path), config["eos_token_id"])


def _mask_id(path: str | Path) -> int:
    # dllm's sampler asks the tokenizer. iLLaDA's users give LLaDA's sampler a number.
    tokenizer: Any = PreTrainedTokenizerFast.from_pretrained(path)
    if tokenizer.mask_token_id is not None:
        return int(tokenizer.mask_token_id)
    return int(tokenizer.convert_tokens_to_ids("<[MASK]>"))
