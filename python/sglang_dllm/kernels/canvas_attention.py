"""Flash attention of ragged windows in one Triton kernel, without a causal mask.

A window reads either its fresh keys, which are packed beside its queries, or the keys
of its canvas in the pool. Windows of both kinds run in one launch. Nothing is gathered,
padded or scattered.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_HEAD_DIMS = (16, 32, 64, 128, 256)


def blocks(head_dim: int, item_size: int, num_queries: int) -> dict[str, int]:
    """Sizes of a program: queries, keys, warps, pipeline stages.

    They compile without spilling for compute capability 8.0 and 9.0, and fit the 99 KiB
    of shared memory that every NVIDIA GPU since 2020 has. They are not tuned.

    Args:
        item_size: bytes of an element of q.
        num_queries: of the longest window and one key head.
    """
    if item_size == 4:
        # Exact fp32 products run in registers, outside of the tensor cores.
        queries, keys = (64, 32) if head_dim <= 64 else (32, 16)
    else:
        queries, keys = (128, 64) if head_dim <= 128 else (64, 32)
    queries = min(queries, max(16, triton.next_power_of_2(num_queries)))
    warps = 8 if item_size == 4 or queries * max(head_dim, 128) >= 128 * 128 else 4
    stages = 1 if item_size * head_dim > 512 else 2
    return {"QUERIES": queries, "KEYS": keys, "num_warps": warps, "num_stages": stages}


def triton_canvas_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    table: torch.Tensor,
    slots: torch.Tensor,
    max_len: int,
    scale: float,
    k_scale: float = 1.0,
    v_scale: float = 1.0,
) -> torch.Tensor:
    """Attention of the queries of B windows to all keys of their canvases.

    Args:
        q: ``(T, H, D)`` bf16, fp16 or fp32; D a power of two from 16 to 256.
        k, v: ``(T, H_kv, D)``, fresh, in the dtype of q; H a multiple of H_kv.
        k_pool, v_pool: ``(S, H_kv, D)``.
        table: ``(B, 4)`` int32: of each window its first token of the T, its tokens,
            the tokens of its canvas, and where its canvas begins in ``slots``. The last
            one is -1 for a window that reads its fresh keys.
        slots: ``(K,)`` int32, of the pool.
        max_len: tokens of the longest window.
        scale: multiplies the dot products.
        k_scale, v_scale: multiply the numbers of the pool.

    Returns:
        ``(T, H, D)`` in the dtype of q. Sums are fp32. The order of a window's sum
        depends on ``blocks`` alone, not on other windows.

    Raises:
        TypeError: the kernel does not compute in the dtype of q.
        ValueError: it does not compute with this head size.
    """
    num_heads, head_dim = q.shape[1:]
    num_kv_heads = k.shape[1]
    if q.dtype not in _DTYPES:
        raise TypeError(f"q must be bf16, fp16 or fp32, not {q.dtype}")
    if head_dim not in _HEAD_DIMS or v.shape[2] != head_dim:
        raise ValueError(
            f"heads of {head_dim} (keys) and {v.shape[2]} (values); expected the same "
            f"for both, one of {_HEAD_DIMS}"
        )
    # The kernel takes no stride for the elements of a head.
    q, k, v = (x if x.stride(2) == 1 else x.contiguous() for x in (q, k, v))
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    group = num_heads // num_kv_heads
    sizes = blocks(head_dim, q.element_size(), max_len * group)
    tiles = triton.cdiv(max_len * group, sizes["QUERIES"])
    with torch.cuda.device_of(q):  # else Triton launches on the current device
        _canvas_kernel[tiles, num_kv_heads, len(table)](
            q, k, v, k_pool, v_pool, out, table, slots,
            scale * math.log2(math.e), k_scale, v_scale,
            q.stride(0), q.stride(1), k.stride(0), k.stride(1),
            v.stride(0), v.stride(1), out.stride(0), out.stride(1),
            k_pool.stride(0), k_pool.stride(1), v_pool.stride(0), v_pool.stride(1),
            GROUP=group, HEAD_DIM=head_dim, **sizes,
        )  # fmt: skip
    return out


@triton.jit
def _attend(  # type: ignore[no-untyped-def]
    queries,  # (QUERIES, HEAD_DIM)
    k,  # at the key head's first element
    v,
    slots,  # at the window's first slot; read only with GATHER
    num_keys,
    scale,
    stride_k,
    stride_v,
    GATHER: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """(QUERIES, HEAD_DIM) fp32: softmax of base 2 over all keys of one window."""
    dims = tl.arange(0, HEAD_DIM)
    peak = tl.full((QUERIES,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((QUERIES,), dtype=tl.float32)
    mixed = tl.zeros((QUERIES, HEAD_DIM), dtype=tl.float32)
    for first in range(0, num_keys, KEYS):
        index = first + tl.arange(0, KEYS)
        is_key = index < num_keys
        if GATHER:
            at = tl.load(slots + index, mask=is_key, other=0).to(tl.int64)
        else:
            at = index.to(tl.int64)
        keys = tl.load(
            k + at[None, :] * stride_k + dims[:, None], mask=is_key[None, :], other=0.0
        ).to(queries.dtype)
        # The default precision would round fp32 inputs to 10 bits.
        scores = tl.dot(queries, keys, input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        # Some of the first keys are never masked, so no peak stays -inf.
        new_peak = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp2(scores - new_peak[:, None])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(weights, axis=1)
        values = tl.load(
            v + at[:, None] * stride_v + dims[None, :], mask=is_key[:, None], other=0.0
        ).to(queries.dtype)
        mixed = mixed * shrink[:, None]
        mixed += tl.dot(weights.to(queries.dtype), values, input_precision="ieee")
        peak = new_peak
    return mixed / total[:, None]


@triton.jit
def _canvas_kernel(  # type: ignore[no-untyped-def]
    q,  # (T, H, HEAD_DIM)
    k,  # (T, H_kv, HEAD_DIM), fresh
    v,
    k_pool,  # (S, H_kv, HEAD_DIM)
    v_pool,
    out,  # (T, H, HEAD_DIM)
    table,  # (B, 4) int32
    slots,  # (K,) int32
    scale,  # of the scores, for exponentials of base 2
    k_scale,  # of the pool's numbers
    v_scale,
    stride_qt,
    stride_qh,
    stride_kt,
    stride_kh,
    stride_vt,
    stride_vh,
    stride_ot,
    stride_oh,
    stride_kps,
    stride_kph,
    stride_vps,
    stride_vph,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Some queries of one window, of all heads that share a key head.

    With these heads side by side, the keys are read once for all of them, and a short
    window fills the tile.
    """
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    window = table + tl.program_id(2) * 4
    first = tl.load(window).to(tl.int64)
    num_tokens = tl.load(window + 1)
    num_keys = tl.load(window + 2)
    first_slot = tl.load(window + 3)
    if tile * QUERIES >= num_tokens * GROUP:
        return
    index = tile * QUERIES + tl.arange(0, QUERIES)
    token = first + index // GROUP
    head = kv_head * GROUP + index % GROUP
    is_query = (index < num_tokens * GROUP)[:, None]
    dims = tl.arange(0, HEAD_DIM)[None, :]
    queries = tl.load(
        q + (token * stride_qt + head * stride_qh)[:, None] + dims,
        mask=is_query,
        other=0.0,
    )
    if first_slot < 0:
        result = _attend(
            queries,
            k + first * stride_kt + kv_head * stride_kh,
            v + first * stride_vt + kv_head * stride_vh,
            slots,
            num_keys,
            scale,
            stride_kt,
            stride_vt,
            False,
            QUERIES,
            KEYS,
            HEAD_DIM,
        )
    else:
        result = v_scale * _attend(
            queries,
            k_pool + kv_head * stride_kph,
            v_pool + kv_head * stride_vph,
            slots + first_slot,
            num_keys,
            scale * k_scale,
            stride_kps,
            stride_vps,
            True,
            QUERIES,
            KEYS,
            HEAD_DIM,
        )
    tl.store(
        out + (token * stride_ot + head * stride_oh)[:, None] + dims,
        result.to(out.dtype.element_ty),
        mask=is_query,
    )
