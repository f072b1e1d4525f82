"""Layers for a CPU, with fewer passes over memory than SGLang's own.

The arithmetic is the same. It works in place where SGLang's native forms allocate. In a
small model the elementwise layers take as long as the matrix products.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.layernorm import RMSNorm
from sglang.srt.layers.moe.token_dispatcher import StandardCombineInput
from sglang.srt.layers.quantization.unquant import UnquantizedFusedMoEMethod
from sglang.srt.layers.rotary_embedding.base import RotaryEmbedding

from sglang_dllm.models.linear import gated_mlp
from sglang_dllm.upstream.compat import register_operator

_HALVES = (torch.bfloat16, torch.float16)


def register(platform_key: str) -> None:
    """Make SGLang's layers use these. Call it before a model is built."""
    # Tables of cosines and sines stay float32, as on a GPU.
    os.environ.setdefault("SGLANG_ROPE_CACHE_FP32", "1")
    register_operator(RMSNorm, rms_norm, platform_key)
    register_operator(SiluAndMul, silu_and_mul, platform_key)
    register_operator(RotaryEmbedding, rotate, platform_key)
    register_operator(UnquantizedFusedMoEMethod, experts, platform_key)


def rms_norm(
    layer: RMSNorm,
    x: torch.Tensor,
    residual: torch.Tensor | None = None,
    *others: Any,
    **named: Any,
) -> Any:
    """``x / rms(x) * weight``. With a residual: the same of their sum, and the sum.

    In half precision the sum and its norm are float32. A layer of another form than
    those of ``models`` takes SGLang's own.
    """
    is_plain = (
        x.dtype == layer.weight.dtype
        and not (others or named)
        and layer.variance_size_override is None
        and (residual is None or residual.dtype == x.dtype)
    )
    if is_plain and x.dtype == torch.float32:
        total = x if residual is None else x + residual
        scale = total.square().mean(dim=-1, keepdim=True)
        scale.add_(layer.variance_epsilon).rsqrt_()
        normed = (total * scale).mul_(layer.weight)
    elif (
        is_plain
        and x.dtype in _HALVES
        and layer.cast_x_before_out_mul
        and layer.override_orig_dtype is None
        and not layer.fp32_residual
    ):
        wide = x.float()
        total = x
        if residual is not None:
            total = wide.add_(residual).to(x.dtype)
        scale = torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square_()
        scale.div_(x.shape[-1]).add_(layer.variance_epsilon).rsqrt_()
        normed = wide.mul_(scale).to(x.dtype).mul_(layer.weight)
    else:
        return layer.forward_native(x, residual, *others, **named)
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
    """Rotary embedding of whole heads, with paired halves (NeoX style).

    It is computed in float32, as on a GPU. SGLang's own form for a CPU rounds cosines
    and sines to the model's dtype. Any other layer takes that form.
    """
    is_plain = (
        layer.is_neox_style
        and layer.cos_sin_cache.dtype == torch.float32
        and layer.rotary_dim == layer.head_size
        and query.dtype == key.dtype
        and query.dtype in (torch.float32, *_HALVES)
        and not any(value is not None for value in (*others, *named.values()))
    )
    if not is_plain:
        rotated: tuple[torch.Tensor, torch.Tensor] = layer.forward_native(
            positions, query, key, *others, **named
        )
        return rotated
    angles = layer.cos_sin_cache.index_select(0, positions.flatten())
    cos, sin = angles.unsqueeze(1).chunk(2, dim=-1)
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
    heads = x.unflatten(-1, (-1, 2 * cos.shape[-1])).float()
    out = torch.empty_like(heads, memory_format=torch.contiguous_format)
    first, second = heads.chunk(2, dim=-1)
    out_first, out_second = out.chunk(2, dim=-1)
    torch.mul(first, cos, out=out_first).addcmul_(second, sin, value=-1)
    torch.mul(second, cos, out=out_second).addcmul_(first, sin)
    return out.flatten(-2).to(x.dtype)


def experts(
    method: UnquantizedFusedMoEMethod, layer: torch.nn.Module, dispatch_output: Any
) -> Any:
    """``sum_e p_e * expert_e(x)`` of a gated SiLU layer, one expert after the other.

    SGLang's own form gives each expert as many rows as it has tokens. In half precision
    almost every product would then need a new kernel (``models.linear``). Any other
    layer, and float32, takes that form.
    """
    x = dispatch_output.hidden_states
    settings = method.moe_runner_config
    is_plain = (
        x.dtype == layer.w13_weight.dtype
        and x.dtype in _HALVES
        and settings.activation == "silu"
        and settings.gemm1_alpha is None
        and not settings.apply_router_weight_on_input
        and getattr(layer, "w13_weight_bias", None) is None
        and getattr(layer, "w2_weight_bias", None) is None
    )
    if not is_plain:
        return method.forward_native(layer, dispatch_output)
    weights, ids = dispatch_output.topk_output[:2]
    num_chosen = ids.shape[1]
    order = ids.flatten().argsort()
    counts = ids.flatten().bincount(minlength=layer.num_experts).tolist()
    out = torch.zeros_like(x, dtype=torch.float32)
    share = weights.flatten().float()[order].unsqueeze(1)
    tokens = order // num_chosen
    first = 0
    gate_up, down = layer.w13_weight, layer.w2_weight
    for index, count in enumerate(counts):
        if not count:
            continue
        part = slice(first, first + count)
        found = gated_mlp(x[tokens[part]], gate_up[index], down[index])
        out.index_add_(0, tokens[part], found * share[part])
        first += count
    return StandardCombineInput(hidden_states=out.to(x.dtype))
