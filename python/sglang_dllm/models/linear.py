"""Matrix products in bfloat16 and float16 on a CPU.

oneDNN computes them with a kernel of its own for each number of rows. A new kernel
takes some 10 ms and 1.2 MB, and batches of canvases are ragged, so a server would make
kernels all the time. Rows are therefore added until the number is one of few. Products
in float32 are MKL's, which has one kernel for all.
"""

from __future__ import annotations

import os

import torch
from sglang.srt.layers.quantization.unquant import (
    UnquantizedEmbeddingMethod,
    UnquantizedLinearMethod,
)
from torch import nn
from torch.nn.functional import linear, pad, silu

_KEPT_KERNELS = "128"
"""The kernels that torch and oneDNN keep (their default is 1024, over a gigabyte)."""

_WEIGHTS_FIRST_ROWS = 512
"""Up to so many rows, ``(W x^T)^T`` takes up to a third less time than ``x W^T``.

oneDNN rearranges the second factor of each product, which is ``x`` then, and smaller
than the weights."""

_WEIGHTS_FIRST_HEAD_ROWS = 48
"""Likewise for a head. Its logits ``(V, T)`` have to be turned round. That takes longer
than it saves where T is larger."""

_HEAD_PART = 16_384
"""Tokens of the vocabulary whose logits are computed and turned round at a time. They
are still in the processor's cache then."""


def padded_rows(num_rows: int) -> int:
    """The number of rows that a product of ``num_rows`` is computed with.

    These are the multiples of 16, an AMX tile's height, up to 512, then 16 numbers in
    each doubling.
    """
    step = max(16, 1 << max(0, (num_rows - 1).bit_length() - 5))
    return -(-num_rows // step) * step


def padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` ``(T, K)`` with rows of zeros behind it.

    ``x`` itself where its product needs none: on a GPU, and in float32.
    """
    if x.device.type != "cpu" or x.dtype not in (torch.bfloat16, torch.float16):
        return x
    missing = padded_rows(len(x)) - len(x)
    return pad(x, (0, 0, 0, missing)) if missing else x


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """``x W^T + b`` from ``x`` ``(T, K)`` to ``(T, N)``, over padded rows."""
    return linear(padded(x), weight, bias)[: len(x)]


def gated_mlp(
    x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor
) -> torch.Tensor:
    """``down(silu(gate x) * up x)``, from ``(T, H)`` to ``(T, H)``, over padded rows.

    Args:
        gate_up: ``(2 * F, H)``, the rows of gate before those of up.
        down: ``(H, F)``.
    """
    rows, x = len(x), padded(x)
    if len(x) <= _WEIGHTS_FIRST_ROWS:
        gate, up = torch.mm(gate_up, x.t()).chunk(2)
        out = torch.mm(down, silu(gate).mul_(up)).t().contiguous()
    else:
        gate, up = linear(x, gate_up).chunk(2, dim=-1)
        out = linear(silu(gate).mul_(up), down)
    return out[:rows]


def head_product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x W^T`` from ``x`` ``(T, K)`` to ``(T, V)``, over padded rows."""
    rows, x = len(x), padded(x)
    if len(x) > _WEIGHTS_FIRST_HEAD_ROWS:
        return linear(x, weight)[:rows]
    out = x.new_empty(rows, len(weight))
    for start in range(0, len(weight), _HEAD_PART):
        part = slice(start, start + _HEAD_PART)
        out[:, part] = torch.mm(weight[part], x.t())[:, :rows].t()
    return out


class PaddedLinear(UnquantizedLinearMethod):
    """``product`` as a layer's method."""

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        return product(x, layer.weight, bias)


class PaddedHead(UnquantizedEmbeddingMethod):
    """``head_product`` as the method of a head, which may be the embedding too.

    SGLang multiplies by itself where a head has the method of the base class. It asks
    a method of another name.
    """

    def apply(
        self, layer: nn.Module, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        found = head_product(x, layer.weight)
        return found if bias is None else found + bias


_PADDED = {
    UnquantizedLinearMethod: PaddedLinear,
    UnquantizedEmbeddingMethod: PaddedHead,
}


def use_padded_products(model: nn.Module) -> None:
    """Give the plain half-precision layers of a model on a CPU these products."""
    for layer in model.modules():
        method = _PADDED.get(type(getattr(layer, "quant_method", None)))
        if method is None:
            continue
        weight = layer.weight
        half = weight.dtype in (torch.bfloat16, torch.float16)
        if weight.device.type == "cpu" and half:
            layer.quant_method = method()
            # Both libraries read their variable at their first product.
            for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
                os.environ.setdefault(name, _KEPT_KERNELS)


def padded_weights(*layers: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """The weights of layers that have this product; None if one has not."""
    if all(isinstance(layer.quant_method, PaddedLinear) for layer in layers):
        return tuple(layer.weight for layer in layers)
    return None
