"""A LLaDA with random weights that every engine of ``benchmark.peers`` loads.

Its vocabulary is the published one, since the head and the statistics over 126,464
tokens take most of the time of a small model. Its ids are the published ones too, which
some engines have in their code.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch

VOCAB_SIZE = 126_464
SPECIAL = {
    "<|startoftext|>": 126_080,
    "<|endoftext|>": 126_081,
    "<|mdm_mask|>": 126_336,
    "<|start_header_id|>": 126_346,
    "<|end_header_id|>": 126_347,
    "<|eot_id|>": 126_348,
}
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
)
SHAPE = {"d_model": 1024, "n_layers": 12, "n_heads": 16, "mlp_hidden_size": 4096}
"""Some 460 million parameters, of which 259 are the embedding and the head."""

_CODE = Path(__file__).with_name("modeling_llada.py")


def write_checkpoint(folder: Path, shape: dict[str, int] = SHAPE) -> Path:
    """Write config, tokenizer, remote code and bf16 weights, and return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_json(folder / "config.json", _config(shape))
    shutil.copy(_CODE, folder / _CODE.name)
    _write_tokenizer(folder)
    _write_weights(folder, shape)
    return folder


def _config(shape: dict[str, int]) -> dict[str, Any]:
    return {
        "architectures": ["LLaDAModelLM"],
        "auto_map": {
            "AutoConfig": "modeling_llada.LLaDAConfig",
            "AutoModel": "modeling_llada.LLaDAModelLM",
        },
        "model_type": "llada",
        **shape,
        "n_kv_heads": shape["n_heads"],
        "vocab_size": VOCAB_SIZE,
        "embedding_size": VOCAB_SIZE,
        "max_sequence_length": 4096,
        "rope_theta": 500000.0,
        "rms_norm_eps": 1e-5,
        "weight_tying": False,
        "activation_type": "silu",
        "block_type": "llama",
        "layer_norm_type": "rms",
        "bos_token_id": SPECIAL["<|startoftext|>"],
        "eos_token_id": SPECIAL["<|endoftext|>"],
        "pad_token_id": SPECIAL["<|endoftext|>"],
        "mask_token_id": SPECIAL["<|mdm_mask|>"],
        "torch_dtype": "bfloat16",
    }


def _write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer whose special tokens have the published ids.

    The ids between the bytes and them belong to tokens that no text has.
    """
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    ids = {
        byte: i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))
    }
    names = {i: name for name, i in SPECIAL.items()}
    # llama.cpp wants a merge: that of two null bytes is in no text.
    null = "Ā"
    ids[null + null] = len(ids)
    for i in range(len(ids), VOCAB_SIZE):
        ids[names.get(i, f"<unused {i}>")] = i
    tokenizer = Tokenizer(BPE(ids, [(null, null)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|startoftext|>",
            "eos_token": "<|endoftext|>",
            "pad_token": "<|endoftext|>",
            "mask_token": "<|mdm_mask|>",
            "chat_template": TEMPLATE,
        },
    )


def _write_weights(folder: Path, shape: dict[str, int]) -> None:
    from safetensors.torch import save_file

    random = torch.Generator().manual_seed(0)
    hidden, ff = shape["d_model"], shape["mlp_hidden_size"]

    def drawn(rows: int, columns: int) -> torch.Tensor:
        weight = torch.empty(rows, columns, dtype=torch.bfloat16)
        return weight.normal_(0, columns**-0.5, generator=random)

    top = "model.transformer"
    tensors = {
        f"{top}.wte.weight": drawn(VOCAB_SIZE, hidden),
        f"{top}.ln_f.weight": torch.ones(hidden, dtype=torch.bfloat16),
        f"{top}.ff_out.weight": drawn(VOCAB_SIZE, hidden),
    }
    sizes = {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj", "attn_out"), (hidden, hidden)),
        **dict.fromkeys(("ff_proj", "up_proj"), (ff, hidden)),
        "ff_out": (hidden, ff),
    }
    for layer in range(shape["n_layers"]):
        block = f"{top}.blocks.{layer}"
        for name in ("attn_norm", "ff_norm"):
            tensors[f"{block}.{name}.weight"] = torch.ones(hidden, dtype=torch.bfloat16)
        for name, (rows, columns) in sizes.items():
            tensors[f"{block}.{name}.weight"] = drawn(rows, columns)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
