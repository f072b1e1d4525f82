"""Tiny random LLaDA and Dream checkpoints in the exact Hugging Face layout.

Owns file layout, tensor names, tokenizer and the shape of the random weights. The
weights are not trained, but they are shaped so that decoding is eventful: entropies
spread from near 0 to near ln V, predictions follow context and position, EOS is
predicted at times, and the mask id is sometimes the raw argmax.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

# Ids are deliberately neither the real checkpoints' nor the last ones of the table:
# code that hard-codes an id, or guesses "vocab_size - 1", fails on these folders.
LLADA_TOKENS = {
    "<|startoftext|>": 258,
    "<|endoftext|>": 259,
    "<|start_header_id|>": 263,
    "<|end_header_id|>": 264,
    "<|eot_id|>": 265,
    "<|mdm_mask|>": 271,
}
DREAM_TOKENS = {
    "<|endoftext|>": 257,
    "<|im_start|>": 258,
    "<|im_end|>": 259,
    "<|mask|>": 280,
}
MIN_VOCAB_SIZE = 281  # the bytes and every special token above

LLADA_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
DREAM_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content']"
    " + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_llada(
    path: str | Path,
    *,
    d_model: int = 64,
    n_layers: int = 2,
    n_heads: int = 4,
    n_kv_heads: int = 4,
    mlp_hidden_size: int = 160,
    vocab_size: int = 300,
    embedding_size: int | None = None,
    include_qkv_bias: bool = False,
    max_sequence_length: int = 4096,
    num_shards: int = 1,
    seed: int = 0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a LLaDAModelLM folder and return it.

    `embedding_size` above `vocab_size` pads the embedding and the head with rows no
    token owns. `head_scale` stretches all logits: above 1 lowers every entropy.
    """
    num_rows = vocab_size if embedding_size is None else embedding_size
    mask_id, eos_id = LLADA_TOKENS["<|mdm_mask|>"], LLADA_TOKENS["<|endoftext|>"]
    rng = torch.Generator().manual_seed(seed)
    top = random_top(rng, d_model, vocab_size, num_rows, mask_id, eos_id, head_scale)
    tensors = {
        "model.transformer.wte.weight": top["embed"],
        "model.transformer.ln_f.weight": top["norm"],
        "model.transformer.ff_out.weight": top["head"],
    }
    names = {
        "norm1.weight": "attn_norm.weight",
        "norm2.weight": "ff_norm.weight",
        "q.weight": "q_proj.weight",
        "k.weight": "k_proj.weight",
        "v.weight": "v_proj.weight",
        "o.weight": "attn_out.weight",
        "gate.weight": "ff_proj.weight",
        "up.weight": "up_proj.weight",
        "down.weight": "ff_out.weight",
    }
    if include_qkv_bias:
        names |= {f"{x}.bias": f"{x}_proj.bias" for x in "qkv"}
    for layer in range(n_layers):
        block = random_block(rng, d_model, n_heads, n_kv_heads, mlp_hidden_size)
        for ours, theirs in names.items():
            tensors[f"model.transformer.blocks.{layer}.{theirs}"] = block[ours]
    config = {
        "activation_type": "silu",
        "alibi": False,
        "alibi_bias_max": 8.0,
        "architectures": ["LLaDAModelLM"],
        "attention_dropout": 0.0,
        "attention_layer_norm": False,
        "attention_layer_norm_with_affine": True,
        "auto_map": {
            "AutoConfig": "configuration_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
            "AutoModelForCausalLM": "modeling_llada.LLaDAModelLM",
        },
        "bias_for_layer_norm": False,
        "block_group_size": 1,
        "block_type": "llama",
        "d_model": d_model,
        "embedding_dropout": 0.0,
        "embedding_size": num_rows,
        "eos_token_id": eos_id,
        "flash_attention": False,
        "include_bias": False,
        "include_qkv_bias": include_qkv_bias,
        "init_cutoff_factor": None,
        "init_device": "meta",
        "init_fn": "mitchell",
        "init_std": 0.02,
        "input_emb_norm": False,
        "layer_norm_type": "rms",
        "layer_norm_with_affine": True,
        "mask_token_id": mask_id,
        "max_sequence_length": max_sequence_length,
        "mlp_hidden_size": mlp_hidden_size,
        "mlp_ratio": 4,
        "model_type": "llada",
        "multi_query_attention": None,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "n_layers": n_layers,
        "pad_token_id": eos_id,
        "precision": "amp_bf16",
        "residual_dropout": 0.0,
        "rms_norm_eps": 1e-05,
        "rope": True,
        "rope_full_precision": True,
        "rope_theta": 500000.0,
        "scale_logits": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.3",
        "use_cache": False,
        "vocab_size": vocab_size,
        "weight_tying": False,
    }
    path = write_model(path, config, tensors, num_shards, dtype)
    named = dict.fromkeys(("eos_token", "pad_token"), "<|endoftext|>")
    named["bos_token"] = "<|startoftext|>"
    write_tokenizer(path, LLADA_TOKENS, vocab_size, LLADA_TEMPLATE, named)
    return path


def write_dream(
    path: str | Path,
    *,
    hidden_size: int = 64,
    num_hidden_layers: int = 2,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    intermediate_size: int = 160,
    vocab_size: int = 300,
    max_position_embeddings: int = 2048,
    num_shards: int = 1,
    seed: int = 0,
    head_scale: float = 1.0,
    dtype: torch.dtype = torch.float32,
) -> Path:
    """Write a DreamModel folder and return it (`head_scale` as in `write_llada`)."""
    mask_id, eos_id = DREAM_TOKENS["<|mask|>"], DREAM_TOKENS["<|endoftext|>"]
    rng = torch.Generator().manual_seed(seed)
    top = random_top(
        rng, hidden_size, vocab_size, vocab_size, mask_id, eos_id, head_scale
    )
    tensors = {
        "model.embed_tokens.weight": top["embed"],
        "model.norm.weight": top["norm"],
        "lm_head.weight": top["head"],
    }
    names = {
        "norm1.weight": "input_layernorm.weight",
        "norm2.weight": "post_attention_layernorm.weight",
        "o.weight": "self_attn.o_proj.weight",
        "gate.weight": "mlp.gate_proj.weight",
        "up.weight": "mlp.up_proj.weight",
        "down.weight": "mlp.down_proj.weight",
    }
    for x in "qkv":
        names[f"{x}.weight"] = f"self_attn.{x}_proj.weight"
        names[f"{x}.bias"] = f"self_attn.{x}_proj.bias"
    for layer in range(num_hidden_layers):
        heads = num_attention_heads, num_key_value_heads
        block = random_block(rng, hidden_size, *heads, intermediate_size)
        for ours, theirs in names.items():
            tensors[f"model.layers.{layer}.{theirs}"] = block[ours]
    config = {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "auto_map": {
            "AutoConfig": "configuration_dream.DreamConfig",
            "AutoModel": "modeling_dream.DreamModel",
        },
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "hidden_act": "silu",
        "hidden_size": hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": intermediate_size,
        "mask_token_id": mask_id,
        "max_position_embeddings": max_position_embeddings,
        "max_window_layers": num_hidden_layers,
        "model_type": "Dream",
        "num_attention_heads": num_attention_heads,
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "pad_token_id": eos_id,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": "4.46.2",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": vocab_size,
    }
    generation_config = {
        "_from_model_config": True,
        "alg": "origin",
        "alg_temp": None,
        "bos_token_id": eos_id,
        "eos_token_id": eos_id,
        "eps": 0.001,
        # Null as in the real checkpoints: the id has to come from config.json.
        "mask_token_id": None,
        "pad_token_id": eos_id,
        "steps": 512,
        "temperature": 0.0,
        "top_k": None,
        "top_p": None,
        "transformers_version": "4.46.2",
    }
    path = write_model(path, config, tensors, num_shards, dtype)
    write_json(path / "generation_config.json", generation_config)
    named = dict.fromkeys(("bos_token", "eos_token", "pad_token"), "<|endoftext|>")
    named["mask_token"] = "<|mask|>"
    write_tokenizer(path, DREAM_TOKENS, vocab_size, DREAM_TEMPLATE, named)
    return path


def random_top(
    rng: torch.Generator,
    width: int,
    vocab_size: int,
    num_rows: int,
    mask_id: int,
    eos_id: int,
    head_scale: float,
) -> dict[str, torch.Tensor]:
    """Embedding (num_rows, width), final norm (width,), head (num_rows, width)."""
    embed = torch.randn(num_rows, width, generator=rng)
    # A faint mask embedding lets what a masked position attends to decide its state.
    embed[mask_id] *= 0.2
    # The final norm fixes the length of the hidden state, so a plain random head gives
    # every position the same entropy. A heavy-tailed gain undoes that: a state lying
    # on the strong directions is sure, one lying on the weak directions knows nothing.
    gain = torch.exp(1.2 * torch.randn(width, generator=rng))
    gain *= math.sqrt(width) / gain.norm()
    head = torch.randn(num_rows, width, generator=rng)
    head *= head_scale * 4.0 / math.sqrt(width)
    # Bytes that do not print are rarely predicted, so answers are mostly readable text;
    # rows no token owns stay near zero, as in a trained model.
    head[:32] *= 0.5
    head[127:256] *= 0.5
    head[256:vocab_size] *= 0.5
    head[vocab_size:] *= 0.1
    head[eos_id] *= 2.6
    head[mask_id] *= 2.9
    return {"embed": embed, "norm": gain, "head": head}


def random_block(
    rng: torch.Generator, width: int, n_heads: int, n_kv_heads: int, mlp_width: int
) -> dict[str, torch.Tensor]:
    """One transformer block under neutral names; biases are there for who uses them."""
    kv_width = width // n_heads * n_kv_heads

    def matrix(rows: int, cols: int, gain: float) -> torch.Tensor:
        return torch.randn(rows, cols, generator=rng) * gain / math.sqrt(cols)

    def vector(size: int, mean: float, std: float) -> torch.Tensor:
        return mean + std * torch.randn(size, generator=rng)

    return {
        "norm1.weight": vector(width, 1.0, 0.1),
        "norm2.weight": vector(width, 1.0, 0.1),
        # Peaky attention: scores with a standard deviation of about 4, so neighbouring
        # masked positions look at different tokens and predict different things.
        "q.weight": matrix(width, width, 2.0),
        "k.weight": matrix(kv_width, width, 2.0),
        "v.weight": matrix(kv_width, width, 1.0),
        "q.bias": vector(width, 0.0, 0.3),
        "k.bias": vector(kv_width, 0.0, 0.3),
        "v.bias": vector(kv_width, 0.0, 0.3),
        "o.weight": matrix(width, width, 1.0),
        "gate.weight": matrix(mlp_width, width, 1.0),
        "up.weight": matrix(mlp_width, width, 1.0),
        "down.weight": matrix(width, mlp_width, 1.0),
    }


def write_model(
    path: str | Path,
    config: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    num_shards: int,
    dtype: torch.dtype,
) -> Path:
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    write_json(path / "config.json", config)
    tensors = {name: t.to(dtype).contiguous() for name, t in tensors.items()}
    if num_shards == 1:
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for shard in range(num_shards):
        file = f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors"
        # Strided on purpose: one layer's tensors end up in different files.
        part = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(part, path / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total_size = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total_size}, "weight_map": weight_map}
    write_json(path / "model.safetensors.index.json", index)
    return path


def write_tokenizer(
    path: Path,
    special_tokens: dict[str, int],
    vocab_size: int,
    chat_template: str | None,
    named_tokens: dict[str, str],
) -> None:
    """Byte-level tokenizer: id b is byte b, then special and reserved tokens.

    It adds no BOS by itself; LLaDA's template writes one, as the real one does.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"vocab_size: need {MIN_VOCAB_SIZE} or more, got {vocab_size}")
    by_id = {i: name for name, i in special_tokens.items()}
    extra = [by_id.get(i, f"<|reserved_token_{i}|>") for i in range(256, vocab_size)]
    vocab = {symbol: byte for byte, symbol in enumerate(byte_symbols())}
    vocab |= {name: 256 + i for i, name in enumerate(extra)}
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(extra)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        **named_tokens,
    )
    fast.chat_template = chat_template
    # Keeps the template inside tokenizer_config.json, as the real folders have it.
    fast.save_pretrained(path, save_jinja_files=False)
    config = json.loads((path / "tokenizer_config.json").read_text())
    # transformers 5 writes its own new class name, which 4 cannot load.
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    write_json(path / "tokenizer_config.json", config)


def byte_symbols() -> list[str]:
    """The printable stand-in of every byte in byte-level BPE (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    spare = iter(range(256, 512))
    return [chr(b) if b in printable else chr(next(spare)) for b in range(256)]


def write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n")
