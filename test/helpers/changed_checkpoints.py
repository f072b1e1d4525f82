"""Checkpoints as other tools write them, made from our tiny ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_checkpoints import write_json

Tensors = dict[str, torch.Tensor]


def change_config(
    path: Path, fields: Mapping[str, Any] | None = None, without: Iterable[str] = ()
) -> Path:
    """Set and remove fields of a folder's config.json."""
    config = json.loads((path / "config.json").read_text())
    for name in without:
        config.pop(name)
    write_json(path / "config.json", config | dict(fields or {}))
    return path


def change_tensors(path: Path, change: Callable[[Tensors], object]) -> Path:
    """Change the tensors of a folder with one file."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    return path


def without_biases(path: Path) -> Path:
    """Remove every bias of attention."""

    def remove(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.endswith("_proj.bias")]:
            del tensors[name]

    return change_tensors(path, remove)


def with_half_the_heads(path: Path) -> Path:
    """Remove two of four heads: a head has another size than hidden / heads."""

    def cut(tensors: Tensors) -> None:
        for name, tensor in tensors.items():
            half = tensor.shape[0] // 2
            if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj"):
                tensors[name] = tensor[:half]
            elif name.endswith("o_proj.weight"):
                tensors[name] = tensor[:, :half]

    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16}
    return change_config(change_tensors(path, cut), heads)


def copy_head(path: Path) -> Path:
    """Make the head a copy of the embedding; both stay in the file."""

    def copy(tensors: Tensors) -> None:
        embedding, head = _top_names(tensors)
        tensors[head] = tensors[embedding].clone()

    return change_tensors(path, copy)


def remove_head(path: Path) -> Path:
    """Remove the head's tensor."""
    return change_tensors(path, lambda tensors: tensors.pop(_top_names(tensors)[1]))


def _top_names(tensors: Tensors) -> tuple[str, str]:
    if "model.transformer.wte.weight" in tensors:
        return "model.transformer.wte.weight", "model.transformer.ff_out.weight"
    return "model.embed_tokens.weight", "lm_head.weight"
