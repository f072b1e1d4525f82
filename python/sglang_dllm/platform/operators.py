"""Elementwise layers for a CPU, with fewer passes over memory than SGLang's own.

The arithmetic is the same. It works in place where SGLang's native forms allocate. In a
small model these layers take as long as the matrix products.
"""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_dllm.upstream.compat import register_operator


def register(platform_key: str) -> None:
    """Make SGLang's layers use these. Call it before a model is built."""
    register_operator(RMSNorm, rms_norm, platform_key)
    register_operator(SiluAndMul, silu_and_mul, platform_key)
    register_operator(RotaryEmbedding, rotate, platform_key)


def rms_norm(
    layer: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *others: Any,
    **named: Any,
) -> Any:
    """``x / rms(x) * weight``. With a residual: the same of their sum, and the sum.

    A layer that is not plain float32 takes SGLang's own form.
    """
    is_plain = (
        x.dtype == layer.weight.dtype == torch.float32
        and not (others or named)
        and layer.variance_size_override is None
        and (residual is None or residual.dtype == torch.float32)
    )
    if not is_plain:
        return layer.forward_native(x, residual, *others, **named)
    total = x if residual is None else x + residual
    scale = total.square().mean(dim=-1, keepdim=True)
    scale.add_(layer.variance_epsilon).rsqrt_()
    normed = (total * scale).mul_(layer.weight)
    return normed if residual is None else (normed, total)


def silu_and_mul(layer: SiluAndMul, x: torch.Tensor) -> torch.Tensor:
    """``silu(x[..., :d]) * x[..., d:]``."""
    gate, up = x.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate).mul_(up)


def rotate(
    layer: RotaryEmbedding,
    positions: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    *others: Any,
    **named: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotary embedding of whole heads in float32, with paired halves (NeoX style).

    Any other layer takes SGLang's own form.
    """
    is_plain = (
        layer.is_neox_style
        and layer.rotary_dim == layer.head_size
        and query.dtype == key.dtype == layer.cos_sin_cache.dtype == torch.float32
        and not any(value is not None for value in (*others, *named.values()))
    )
    if not is_plain:
        rotated: tuple[torch.Tensor, torch.Tensor] = layer.forward_native(
            positions, query, key, *others, **named
        )
        return rotated
    cos, sin = layer.cos_sin_cache[positions.flatten()].unsqueeze(1).chunk(2, dim=-1)
    if not _is_behind(key, query):
        return _rotated(query, cos, sin), _rotated(key, cos, sin)
    widths = query.shape[-1], key.shape[-1]
    both = query.as_strided((len(query), sum(widths)), query.stride())
    rotated_query, rotated_key = _rotated(both, cos, sin).split(widths, dim=-1)
    return rotated_query, rotated_key


def _is_behind(key: torch.Tensor, query: torch.Tensor) -> bool:
    """True if each row of the key follows the query's row in memory.

    Both are then parts of one product, and one pass rotates them together.
    """
    return (
        query.ndim == key.ndim == 2
        and query.stride() == key.stride()
        and key.data_ptr() == query.data_ptr() + query.shape[-1] * query.itemsize
    )


def _rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate ``x`` ``(T, H * D)`` by ``cos`` and ``sin`` ``(T, 1, D / 2)``."""
    heads = x.unflatten(-1, (-1, 2 * cos.shape[-1]))
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    first, second = heads.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.flatten(-2)
