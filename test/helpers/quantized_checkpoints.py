"""Quantized checkpoints as the usual tools write them, each with its dense twin.

FP8 as AutoFP8 and transformers write it, INT4 as AutoAWQ and GPTQModel do, both as
llm-compressor does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from helpers.upstream_shapes import HAS_PLAIN_GPTQ

Tensors = dict[str, torch.Tensor]
Quantize = Callable[[torch.Tensor], tuple[Tensors, torch.Tensor]]
"""Takes a layer's (N, K) weight; returns its tensors by leaf name, and the weight that
they hold."""

BLOCK = GROUP = 128


def to_fp8(
    weight: torch.Tensor, largest: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Float8 weights, float32 scales, and the weights they stand for.

    Args:
        largest: the largest absolute weight of all that share a scale.
    """
    scale = largest / torch.finfo(torch.float8_e4m3fn).max
    q = (weight / scale).to(torch.float8_e4m3fn)
    return q, scale, q.float() * scale


def fp8(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scale, dense = to_fp8(weight, weight.abs().max())
    return {"weight": q, "weight_scale": scale}, dense


def fp8_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, dense = fp8(weight)
    return tensors | {"input_scale": weight.std()}, dense


def fp8_blocks(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    n, k = (size // BLOCK for size in weight.shape)
    blocks = weight.view(n, BLOCK, k, BLOCK)
    q, scale, dense = to_fp8(blocks, blocks.abs().amax((1, 3), keepdim=True))
    tensors = {"weight": q.view(weight.shape), "weight_scale_inv": scale.view(n, k)}
    return tensors, dense.view(weight.shape)


def ct_channels(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scale, dense = to_fp8(weight, weight.abs().amax(1, keepdim=True))
    return {"weight": q, "weight_scale": scale}, dense


def ct_static(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, dense = fp8_static(weight)
    # llm-compressor writes vectors of one element, AutoFP8 plain numbers.
    return {k: v if v.dim() else v.view(1) for k, v in tensors.items()}, dense


def online(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    return {"weight": weight}, ct_channels(weight)[1]


def pack(nibbles: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> Any:
    """Pack (R, 8 C) numbers of 0 to 15 to (R, C) int32: the i-th of eight goes to
    place order[i]."""
    words = torch.zeros(nibbles.shape[0], nibbles.shape[1] // 8, dtype=torch.int64)
    for i, place in enumerate(order):
        words |= nibbles[:, i::8].long() << 4 * place
    return words.to(torch.int32)


def to_int4(
    weight: torch.Tensor, symmetric: bool, groups: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantize columns by their group.

    Args:
        weight: (N, K) float32.
        groups: (K,), the group of every input; None: in order.

    Returns:
        (N, K) of 0 to 15; (N, G) float16 scales; (N, G) zeros; (N, K) float32.
    """
    groups = torch.arange(weight.shape[1]) // GROUP if groups is None else groups
    grouped = weight[:, groups.argsort()].unflatten(1, (-1, GROUP))
    if symmetric:
        scale = (grouped.abs().amax(2) / 7.5).half()
        zero = torch.full_like(scale, 8)
    else:
        low, high = grouped.amin(2).clamp(max=0), grouped.amax(2).clamp(min=0)
        scale = ((high - low) / 15).half()
        zero = (-low / scale).round().clamp(1, 15)
    q = (weight / scale[:, groups] + zero[:, groups]).round().clamp(0, 15)
    return q, scale, zero, (q - zero[:, groups]) * scale[:, groups]


def ct_int4(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scale, _, dense = to_int4(weight, symmetric=True)
    tensors = {"weight_packed": pack(q), "weight_scale": scale}
    return tensors | {"weight_shape": torch.tensor(weight.shape)}, dense


def awq(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    q, scale, zero, dense = to_int4(weight, symmetric=False)
    order = (0, 4, 1, 5, 2, 6, 3, 7)
    packed = {"qweight": pack(q.t(), order), "qzeros": pack(zero.t(), order)}
    return packed | {"scales": scale.t()}, dense


def gptq(
    weight: torch.Tensor, symmetric: bool = True, desc_act: bool = False
) -> tuple[Tensors, torch.Tensor]:
    groups = torch.arange(weight.shape[1]) // GROUP
    if desc_act:
        # Layers that read the same input get the same order, as from the tool.
        rng = torch.Generator().manual_seed(len(groups))
        groups = groups[torch.randperm(len(groups), generator=rng)]
    q, scale, zero, dense = to_int4(weight, symmetric, groups)
    packed = {"qweight": pack(q).t(), "qzeros": pack(zero.t() - 1)}
    return packed | {"scales": scale.t(), "g_idx": groups.int()}, dense


gptq_ordered = partial(gptq, desc_act=True)


def with_zero_biases(weight: torch.Tensor) -> tuple[Tensors, torch.Tensor]:
    tensors, dense = gptq(weight)
    return tensors | {"bias": torch.zeros(len(weight))}, dense


def ct_config(
    weights: dict[str, Any], inputs: dict[str, Any] | None, layout: str
) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "config_groups": {"group_0": group},
        "quantization_status": "compressed",
    }


def ct_fp8_config(weights: str, inputs: str, dynamic: bool) -> dict[str, Any]:
    number = {"num_bits": 8, "type": "float", "symmetric": True}
    return ct_config(
        number | {"strategy": weights, "dynamic": False},
        number | {"strategy": inputs, "dynamic": dynamic},
        "float-quantized",
    )


FP8 = {"quant_method": "fp8", "activation_scheme": "dynamic"}
FP8_STATIC = FP8 | {"activation_scheme": "static"}
FP8_BLOCKS = FP8 | {"weight_block_size": [BLOCK, BLOCK]}
CT_CHANNELS = ct_fp8_config("channel", "token", dynamic=True)
CT_STATIC = ct_fp8_config("tensor", "tensor", dynamic=False)
_INT4_GROUPS = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": GROUP}
CT_INT4 = ct_config(_INT4_GROUPS | {"symmetric": True}, None, "pack-quantized")
INT4 = {"bits": 4, "group_size": GROUP}
AWQ = {"quant_method": "awq", "zero_point": True, "version": "gemm"} | INT4
GPTQ = {"quant_method": "gptq", "sym": True, "desc_act": False} | INT4
GPTQ_ORDERED = GPTQ | {"desc_act": True}
GPTQ_ZEROS = GPTQ | {"sym": False}
GPTQ_HEAD = GPTQ | {"lm_head": True}


@dataclass(frozen=True)
class Scheme:
    """The tensors and the config that a tool writes, and SGLang's class for them."""

    quantize: Quantize
    config: dict[str, Any] | None
    computed_by: str
    flags: tuple[str, ...] = ()
    head_too: bool = False


_FP8, _CT_FP8 = "Fp8LinearMethod", "CompressedTensorsW8A8Fp8"
_GPTQ, _GPTQ_MARLIN = "GPTQLinearScheme", "GPTQMarlinLinearScheme"
SCHEMES = {
    "fp8": Scheme(fp8, FP8, _FP8),
    "fp8-static": Scheme(fp8_static, FP8_STATIC, _FP8),
    "fp8-blocks": Scheme(fp8_blocks, FP8_BLOCKS, _FP8),
    "fp8-online": Scheme(online, None, _FP8, ("--quantization", "fp8")),
    "ct-fp8-channels": Scheme(ct_channels, CT_CHANNELS, _CT_FP8),
    "ct-fp8-static": Scheme(ct_static, CT_STATIC, _CT_FP8),
    "ct-int4": Scheme(ct_int4, CT_INT4, "CompressedTensorsWNA16"),
    "awq": Scheme(awq, AWQ, "AWQLinearScheme", ("--quantization", "awq")),
    "awq-marlin": Scheme(awq, AWQ, "AWQMarlinLinearScheme"),
    "gptq-marlin": Scheme(gptq, GPTQ, _GPTQ_MARLIN),
    "gptq-marlin-ordered": Scheme(gptq_ordered, GPTQ_ORDERED, _GPTQ_MARLIN),
    "gptq-head": Scheme(gptq, GPTQ_HEAD, _GPTQ_MARLIN, head_too=True),
    "gptq-zero-biases": Scheme(with_zero_biases, GPTQ, _GPTQ_MARLIN),
}
"""Schemes by name. SGLang takes Marlin's kernels if config and flags let it choose."""

if HAS_PLAIN_GPTQ:
    SCHEMES["gptq"] = Scheme(partial(gptq, symmetric=False), GPTQ_ZEROS, _GPTQ)
    SCHEMES["gptq-ordered"] = Scheme(
        gptq_ordered, GPTQ_ORDERED, _GPTQ, ("--quantization", "gptq")
    )

_BLOCK_WEIGHT = re.compile(r".*\.(?:blocks|layers)\.\d+\..*")
HEADS = ("model.transformer.ff_out.weight", "lm_head.weight")


def quantize_folder(
    path: Path, dense_path: Path, scheme: Scheme, left_out: tuple[str, ...] = ()
) -> None:
    """Replace the blocks' matrices of a folder; write the plain twin beside it.

    Args:
        path, dense_path: the same float32 checkpoint twice.
        left_out: layers that stay as they are, by the checkpoint's names.
    """
    quantized, dense = {}, {}
    for name, tensor in load_file(path / "model.safetensors").items():
        layer = name.removesuffix(".weight")
        is_in_scope = _BLOCK_WEIGHT.match(name) or (scheme.head_too and name in HEADS)
        if tensor.dim() == 1 or not is_in_scope or layer in left_out:
            quantized[name] = dense[name] = tensor
            continue
        pieces, dense[name] = scheme.quantize(tensor)
        names = {leaf: f"{layer}.{leaf}" for leaf in pieces}
        # Zeros must not replace a bias that the layer has in the file.
        quantized |= {names[x]: pieces[x] for x in pieces if names[x] not in quantized}
    for folder, tensors in (path, quantized), (dense_path, dense):
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, folder / "model.safetensors", metadata={"format": "pt"})
    if scheme.config is not None:
        edit_config(path, scheme.config)


def edit_config(path: Path, quantization: dict[str, Any]) -> None:
    file = path / "config.json"
    config = json.loads(file.read_text())
    config.setdefault("quantization_config", {}).update(quantization)
    file.write_text(json.dumps(config))
