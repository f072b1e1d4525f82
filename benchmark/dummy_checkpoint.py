"""LLaDA and Dream folders without weights, for ``--load-format dummy``.

SGLang then draws the weights itself, uniform within 0.001. Such a folder serves any
size of model without a download and without a file of weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

MASK, EOS = "<|mask|>", "<|endoftext|>"
MASK_ID, EOS_ID = 256, 257
MIN_VOCAB_SIZE = 258
"""The 256 bytes, then the mask and EOS."""


def write_llada(
    folder: Path,
    *,
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    ff: int,
    vocab: int,
    dtype: str,
) -> Path:
    """Write a LLaDA folder and return it."""
    config = {
        "architectures": ["LLaDAModelLM"],
        "model_type": "llada",
        "d_model": hidden,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": kv_heads,
        "mlp_hidden_size": ff,
        "vocab_size": vocab,
        "embedding_size": vocab,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "weight_tying": False,
    }
    return _write(folder, config, dtype)


def write_dream(folder: Path, *, hidden: int, vocab: int) -> Path:
    """Write a Dream folder of two layers in float32 and return it."""
    heads = max(1, hidden // 64)
    config = {
        "architectures": ["DreamModel"],
        "model_type": "Dream",
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "vocab_size": vocab,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    return _write(folder, config, "float32")


def _write(folder: Path, config: dict[str, Any], dtype: str) -> Path:
    """Add the ids to a config, and write it with a byte-level tokenizer."""
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    folder.mkdir(parents=True, exist_ok=True)
    ids = {"mask_token_id": MASK_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    _write_json(folder / "config.json", {**config, **ids, "torch_dtype": dtype})
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({byte: i for i, byte in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in (MASK, EOS)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"mask_token": MASK, "eos_token": EOS, "pad_token": EOS}
    classes = {"tokenizer_class": "PreTrainedTokenizerFast"}
    _write_json(folder / "tokenizer_config.json", {**classes, **names})
    return folder


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
