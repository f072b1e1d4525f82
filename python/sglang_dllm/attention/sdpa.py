"""Ragged bidirectional attention of canvases' windows, on torch's SDPA."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch
from torch.nn.functional import scaled_dot_product_attention

from sglang_dllm.attention.plan import AttentionPlan
from sglang_dllm.decoding.window import Window


def canvas_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    plan: AttentionPlan,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """The planned tokens attend to every token of their own canvas.

    Args:
        q: ``(T, H, D)`` float, the plan's windows back to back.
        k, v: ``(T, H_kv, D)``, fresh; H a multiple of H_kv.
        k_pool, v_pool: ``(S, H_kv, D)``: the layer's pool, into which the fresh ones
            of canvases that keep theirs are written first.
        scale: multiplies the dot products.

    Returns:
        ``(T, H, D)``.

    A full row attends to fresh keys and values and reads nothing from the pool.
    Neighbouring rows of one shape run as one call; nothing is padded.
    """
    if plan.kept is not None:
        tokens, slots = plan.kept
        k_pool[slots] = k[tokens].to(k_pool.dtype)
        v_pool[slots] = v[tokens].to(v_pool.dtype)
    parts: list[torch.Tensor] = []
    first = 0
    for (length, _, is_full), same in groupby(plan.windows, _shape):
        rows = list(same)
        end = first + length * len(rows)
        if is_full:
            keys, values = k[first:end], v[first:end]
        else:
            keys, values = _of_pool(k_pool, rows, k), _of_pool(v_pool, rows, v)
        parts.append(attend(q[first:end], keys, values, len(rows), scale))
        first = end
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    num_rows: int,
    scale: float,
) -> torch.Tensor:
    """Attention of rows of equal shape, ``(R * Q, H, D)``.

    Args:
        q: ``(R * Q, H, D)`` for R rows.
        k, v: ``(R * K, H_kv, D)``.
    """
    result = scaled_dot_product_attention(
        q.unflatten(0, (num_rows, -1)).transpose(1, 2),
        k.unflatten(0, (num_rows, -1)).transpose(1, 2),
        v.unflatten(0, (num_rows, -1)).transpose(1, 2),
        scale=scale,
        enable_gqa=q.shape[1] != k.shape[1],
    )
    return result.transpose(1, 2).flatten(0, 1)


def _shape(row: Window) -> tuple[int, int, bool]:
    return row.num_tokens, row.canvas_len, row.is_full


def _of_pool(
    pool: torch.Tensor, rows: Sequence[Window], fresh: torch.Tensor
) -> torch.Tensor:
    """The rows' canvases ``(R * K, H_kv, D)``, in the dtype of the fresh ones."""
    slots = [row.kv_slots for row in rows if row.kv_slots is not None]
    assert len(slots) == len(rows), "a window needs the rest's keys and values"
    return pool[slots[0] if len(slots) == 1 else torch.cat(slots)].to(fresh.dtype)
