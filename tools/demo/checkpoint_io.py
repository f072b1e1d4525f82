"""Reads and writes the demo model in the Hugging Face LLaDA layout."""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor

from sglang_dllm.demo.tokenizer import BOS, EOS, MASK, save_tokenizer, write_json
from tools.demo.model import DemoModel, ModelShape

MAX_LENGTH = 1024


def llada_config(shape: ModelShape, tokenizer: Tokenizer) -> dict[str, object]:
    """The fields of the published LLaDA config.json with our sizes and ids."""
    return {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        **asdict(shape),
        "n_kv_heads": shape.n_heads,
        "mlp_ratio": 4,
        "embedding_size": shape.vocab_size,
        "max_sequence_length": MAX_LENGTH,
        "rope": True,
        "rope_full_precision": True,
        "layer_norm_type": "rms",
        "attention_layer_norm": False,
        "include_bias": False,
        "include_qkv_bias": False,
        "bias_for_layer_norm": False,
        "activation_type": "silu",
        "block_type": "llama",
        "block_group_size": 1,
        "weight_tying": False,
        "scale_logits": False,
        "input_emb_norm": False,
        "alibi": False,
        "attention_dropout": 0.0,
        "embedding_dropout": 0.0,
        "residual_dropout": 0.0,
        "flash_attention": False,
        "use_cache": False,
        "mask_token_id": tokenizer.token_to_id(MASK),
        "bos_token_id": tokenizer.token_to_id(BOS),
        "eos_token_id": tokenizer.token_to_id(EOS),
        "pad_token_id": tokenizer.token_to_id(EOS),
        "torch_dtype": "float32",
    }


def save_checkpoint(
    weights: dict[str, Tensor], shape: ModelShape, tokenizer: Tokenizer, folder: Path
) -> None:
    """Write a whole folder. The weights file is replaced in one step."""
    save_tokenizer(tokenizer, folder)
    config = llada_config(shape, tokenizer)
    write_json(folder / "config.json", config)
    ids = ("bos_token_id", "eos_token_id", "pad_token_id")
    write_json(folder / "generation_config.json", {name: config[name] for name in ids})
    named = {f"model.{name}": w.contiguous() for name, w in weights.items()}
    fresh = folder / "model.safetensors.new"
    save_file(named, fresh, metadata={"format": "pt"})
    fresh.chmod(0o644)
    os.replace(fresh, folder / "model.safetensors")


def load_checkpoint(folder: Path) -> tuple[DemoModel, Tokenizer]:
    """The model in float32, ready to decode, and its tokenizer."""
    model = DemoModel(ModelShape.from_config(folder), MAX_LENGTH)
    named = load_file(folder / "model.safetensors")
    model.load_state_dict(
        {name.removeprefix("model."): w.to(torch.float32) for name, w in named.items()}
    )
    return model.eval(), Tokenizer.from_file(str(folder / "tokenizer.json"))
