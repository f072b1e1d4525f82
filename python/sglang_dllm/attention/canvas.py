"""Ragged bidirectional attention over fresh q, k, v, on torch's SDPA."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import scaled_dot_product_attention


def full_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lens: Sequence[int],
    scale: float,
) -> torch.Tensor:
    """Every token attends to every token of its own canvas.

    Args:
        q: ``(T, H, D)`` float, the canvases of the batch back to back.
        k, v: ``(T, H_kv, D)``, H a multiple of H_kv.
        lens: tokens of each canvas, in order; they sum to T.
        scale: multiplies the dot products.

    Returns:
        ``(T, H, D)``.

    Canvases of one length run as one call: with a batch dimension where all are
    equal, else one call a canvas; nothing is padded and nothing read from a pool.
    """
    grouped = q.shape[1] != k.shape[1]
    if len(set(lens)) == 1:
        shape = (len(lens), lens[0])
        out = scaled_dot_product_attention(
            q.unflatten(0, shape).transpose(1, 2),
            k.unflatten(0, shape).transpose(1, 2),
            v.unflatten(0, shape).transpose(1, 2),
            scale=scale,
            enable_gqa=grouped,
        )
        return out.transpose(1, 2).reshape(q.shape[0], q.shape[1], v.shape[2])
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    start = 0
    for length in lens:
        end = start + length
        out[start:end] = (
            scaled_dot_product_attention(
                q[None, start:end].transpose(1, 2),
                k[None, start:end].transpose(1, 2),
                v[None, start:end].transpose(1, 2),
                scale=scale,
                enable_gqa=grouped,
            )
            .transpose(1, 2)
            .squeeze(0)
        )
        start = end
    return out
